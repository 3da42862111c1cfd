"""The protocol's options: transforms, augmentations, lists of images, a folder of one's own."""

import os

from bad_input.calls import a_run
from bad_input.case import Case
from bad_input.configuration import flag
from bad_input.data import PNG, folder_with, load, only
from PIL import Image

from vit_at import configs
from vit_at.data import ids, own, sources


def evaluate(option: str, says: str, **files: str | bytes) -> Case:
    """``vit-at evaluate`` on a run of the digits, beside these files."""

    def prepare(folder):
        a_run(folder)
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / f"{name}.txt").write_bytes(data)

    return Case(["evaluate", "run", option], says, prepare)


def listed(says: str, content: str | bytes, split: str = "train") -> Case:
    """A list of images of a folder that holds train/a/n.png and train/a/good.png."""

    def prepare(folder):
        folder_with(content=PNG)(folder)
        data = content.encode() if isinstance(content, str) else content
        (folder / "ids.txt").write_bytes(data)

    def deed(folder):
        config = configs.load("digits_sgd").unlock().data
        config.name = f"folder:{folder}"
        sources.load(config, split, chosen=str(folder / "ids.txt"))

    return Case(deed, says, prepare)


def folder_recipe(says: str, prepare=None, **fields) -> Case:
    def deed(folder):
        config = configs.load("folder:scratch").unlock()
        config.data.update({"name": f"folder:{folder}"} | fields)
        own.from_images(config)

    return Case(deed, says, prepare)


def strip(folder):
    """Writes an image of 1 x 300 pixels."""
    folder_with(content=PNG)(folder)
    Image.new("L", (1, 300)).save(folder / "train/a/strip.png")


USUAL = "resize256-crop224"
CASES = {
    "unknown transform": flag("data.transform=crop", "'crop', which is unknown; write squash"),
    "transform with another filter": flag(f"data.transform={USUAL}-lanczos", "is unknown"),
    "transform in capitals": flag("data.transform=Squash", "is unknown; write squash"),
    "empty transform": flag("data.transform=", "'', which is unknown"),
    "transform of no pixels": flag("data.transform=resize0-crop0", "is unknown"),
    "transform of a size beyond any image": flag("data.transform=resize99999-crop16", "is unknown"),
    "transform of another size": flag(f"data.transform={USUAL}", "data.image_size .* is 16"),
    "crop beyond the image": flag("data.transform=resize8-crop16", "crops 16 pixels of 8"),
    "transform of the command": evaluate(f"--transform={USUAL}", "make them equal"),
    "unknown transform of the command": evaluate("--transform=x", r"\(--transform\) is 'x'"),
    "unknown augmentation": flag("data.augment=autoaugment", "nearest: randaugment"),
    "augmentation without its second number": flag("data.augment=randaugment-2", "-N-M with N"),
    "magnitude beyond 30": flag("data.augment=randaugment-2-31", "M from 0 to 30"),
    "half an operation": flag("data.augment=randaugment-1.5-9", "N from 1 to 20"),
    "probability over 1": flag("data.augment=random-erasing-2", "P from 0.0 to 1.0"),
    "crop of nothing": flag("data.augment=random-resized-crop-0", "A from 0.01"),
    "strength that is no number": flag("data.augment=color-jitter-1.2.3", "S from 0.0"),
    "augmentation after a comma too many": flag("data.augment=color-jitter,", "names ''"),
    "two ways to crop": flag(
        "data.augment=random-resized-crop", "two ways to crop", "data.crop_padding=2"
    ),
    "unknown word of what images say": flag("data.from_images=mean", "'mean', which is unknown"),
    "ids in no file": evaluate("--ids=none.txt", "'none.txt', which is no file"),
    "ids of a set without file names": evaluate(
        "--ids=x.txt", "no feature 'file_name'", x="0/1.png"
    ),
    "a directory as ids": Case(lambda folder: ids.read(str(folder)), "which is no file"),
    "a pipe as ids": Case(
        lambda folder: ids.read(str(folder / "p")), "no file", lambda f: os.mkfifo(f / "p")
    ),
    "empty list of ids": listed("names no image", "\n\n"),
    "bytes as ids": listed("can't be read", b"\xff\xfe\x00a"),
    "ids without a class": listed(
        "line 2 of .* is 'n.png'; write it as CLASS/FILE", "a/n.png\nn.png"
    ),
    "the same id twice": listed("line 2 of .* names 'a/n.png' again", "a/n.png\nval/a/n.png"),
    "an image that is not there": listed(
        "a/x.png, which folder:.* does not have", "a/n.png\na/x.png"
    ),
    "an image of another class": listed("b/n.png", "b/n.png"),
    "a strip that can't be cropped": Case(
        load("folder", transform="resize16-crop8"),
        "can't be decoded .*too unequal to crop",
        strip,
    ),
    "folder recipe without a folder": Case(
        ["train", "folder:scratch"], "'folder:images', which is no directory"
    ),
    "folder recipe on an empty folder": folder_recipe("has no classes"),
    "folder recipe on classes without splits": folder_recipe(
        "arrange it as .*<split>/<class>/<image>", only("cats/1.png", "dogs/2.png")
    ),
    "folder recipe without a training split": folder_recipe(
        "no split 'train'", folder_with("test/a/n.png", PNG)
    ),
    "folder recipe with a damaged image": folder_recipe(
        "n.png can't be decoded", folder_with(content=PNG[:40])
    ),
    "folder recipe for images of another size": folder_recipe(
        "data.image_size .* is 8; make them equal", folder_with(content=PNG), transform=USUAL
    ),
}
