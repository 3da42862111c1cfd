"""What a recipe for images of your own takes from them: ``data.from_images`` names it.

splits         data.test_split, where a folder lacks it: 'test', 'validation' or 'val', or else a
               fifth of the training images; data.validation_examples: at most a tenth of the rest
image_size     data.image_size: at most the median shorter side; model.patch_size to go with it,
               if it is 0
normalisation  data.mean and data.std of the training images

The values are stored in the run's ``config.json``, so evaluation and export use the same ones.
"""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vit_at.config import differences, flatten
from vit_at.data import backends, folders, sources
from vit_at.errors import UserError

NAMES = ("image_size", "normalisation", "splits")
_TEST_SPLITS = ("test", "validation", "val")
_MOST_READ = 10_000  # images, evenly spaced, for the normalisation
_PATCHES = ((128, 0), (64, 8), (32, 4), (0, 2))  # (smallest image, patch; 0: the model's own)


def from_images(config: ConfigDict) -> ConfigDict:
    """The configuration with what ``data.from_images`` names set, and that field empty; logs it.

    Raises:
      UserError: an unknown name, or a data set that can't be opened or read.
    """
    names = [name.strip() for name in config.data.from_images.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(NAMES)):
        raise UserError(
            f"data.from_images names '{unknown[0]:.80}', which is unknown; use {', '.join(NAMES)}"
        )
    if not names:
        return config
    config = config.copy_and_resolve_references().unlock()
    before, data = flatten(config), config.data
    if "splits" in names:
        _set_test_split(data)
    encoded = sources.open_encoded(data, data.train_split)
    if "splits" in names:
        tenth = max(1, len(encoded.indices) // 10)
        data.validation_examples = min(data.validation_examples, tenth)
    if "image_size" in names:
        _set_image_size(config, encoded)
    if "normalisation" in names:
        data.mean, data.std = _moments(data)
    data.from_images = ""
    changes = [line for line in differences(before, config) if "from_images" not in line]
    start = config.model.pretrained or "scratch"
    told = "; ".join(changes) or "nothing"
    logging.info(
        "set from the images of %s: %s; training starts from %s", encoded.name, told, start
    )
    return config


def _set_test_split(data: ConfigDict) -> None:
    """Chooses the test images of a folder without the split that the configuration names."""
    root = sources.path_of(data)
    if not (data.name.startswith("folder:") and root.is_dir()):
        return
    found = folders.folders(root)
    if data.test_split.partition("[")[0] in found or data.train_split not in found:
        return
    others = [name for name in _TEST_SPLITS if name in found and name != data.train_split]
    if others:
        data.test_split = others[0]
    else:
        train = data.train_split
        data.train_split, data.test_split = f"{train}[:80%]", f"{train}[80%:]"


def _set_image_size(config: ConfigDict, encoded: backends.Encoded) -> None:
    """The median shorter side, rounded down to a multiple of 16, or of 8 below 16."""
    found = backends.headers(encoded, count=256)
    most = config.data.image_size
    side = min(most, int(np.median([min(width, height) for width, height, _ in found] or [most])))
    if side < most:
        step = 16 if side >= 16 else 8
        config.data.image_size = max(8, side // step * step)
    if not config.model.patch_size and not config.model.name.startswith("swin"):
        patches = (patch for least, patch in _PATCHES if config.data.image_size >= least)
        config.model.patch_size = next(patches)


def _moments(data: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the training images, in pixel units."""
    examples = sources.load(sources.streamed(data), data.train_split)
    count = min(len(examples), _MOST_READ)
    rows = np.linspace(0, len(examples) - 1, count).astype(int)
    total = np.zeros((2, len(data.mean)))
    for start in range(0, count, 256):
        pixels = examples.read(rows[start : start + 256])[0].astype(np.float64) / 255
        total += [pixels.sum((0, 1, 2)), (pixels**2).sum((0, 1, 2))]
    mean, square = total / (count * data.image_size**2)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    # Rounded as such numbers are published; a constant channel has no deviation to divide by.
    return (
        tuple(round(float(value), 4) for value in mean),
        tuple(max(0.001, round(float(value), 4)) for value in std),
    )
