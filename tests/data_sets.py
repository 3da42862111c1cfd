"""Configurations of data, and image files, that several test files share."""

from ml_collections import ConfigDict
from PIL import Image


def config(name="digits", **fields) -> ConfigDict:
    """The ``data`` fields of a configuration, as the loaders take them: grey images of 8x8."""
    defaults = {"dir": "", "image_size": 8, "mean": (0.5,), "cache_gib": 4.0, "decoded_dir": ""}
    defaults |= {"allow_overlap": False, "transform": "squash", "stratified": False}
    defaults |= {"train_split": "train", "test_split": "test"}
    return ConfigDict({"name": name, **defaults, **fields})


def write_image(path, size=(8, 8), color=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
