"""``vit-at evaluate`` of weights, functions and other data that can't be used."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from bad_input import calls
from bad_input.case import Case
from bad_input.weights import arrays

from vit_at.workdir.registry import PACKAGED

MODEL = "--model=deit_tiny_patch16_224"
MODULE = """
def f(images):
    return images
def not_finite(images):
    return images.mean((1, 2)) / 0
def of_batch(images):
    return images.mean((1, 2)) - images.mean()
NUMBER = 3
"""


def wrapped(prefix: str = "", **more: np.ndarray) -> Callable[[pathlib.Path], Any]:
    """Writes the weights of a small DeiT to w.safetensors."""

    def prepare(folder: pathlib.Path) -> None:
        content = {prefix + name: value for name, value in arrays().items()} | more
        safetensors.numpy.save_file(content, folder / "w.safetensors")

    return prepare


def grey(folder: pathlib.Path) -> None:
    """Writes the weights of a small DeiT for grey images."""
    kernel = arrays()["patch_embed.proj.weight"].mean(1, keepdims=True)
    wrapped(**{"patch_embed.proj.weight": kernel})(folder)


def file(says: str, *options: str, prepare: Callable[[pathlib.Path], Any] | None = None) -> Case:
    """An evaluation of these weights, which have 2 heads and 3 classes."""
    command = ["evaluate", "--weights=w.safetensors", MODEL, *options]
    return Case(command, says, prepare or wrapped())


def function(says: str, name: str, *options: str) -> Case:
    """An evaluation of a function of pixels.py."""

    def prepare(folder: pathlib.Path) -> None:
        (folder / "pixels.py").write_text(MODULE)
        (folder / "broken.py").write_text("import a_module_that_is_not_there\n")

    return Case(["evaluate", f"--function={name}", *options], says, prepare)


def npy(says: str, images: np.ndarray, labels: Any, split: str = "test") -> Case:
    """An evaluation of a small DeiT on an array of images."""

    def prepare(folder: pathlib.Path) -> None:
        wrapped()(folder)
        np.save(folder / "x.npy", images)
        np.save(folder / "labels.npy", labels)

    options = ["--num_heads=2", "--data=npy:x.npy", f"--split={split}"]
    return Case(["evaluate", "--weights=w.safetensors", MODEL, *options], says, prepare)


PIXELS = np.zeros((10, 32, 32, 3), np.uint8)
STATISTICS = {f"normalize.{n}": np.full((1, 3, 1, 1), 0.5, np.float32) for n in ("mean", "std")}

CASES = {
    "two sources": Case(["evaluate", ".", "--weights=w.npz", MODEL], "WORKDIR and --weights are"),
    "a checkpoint of a weight file": file("only WORKDIR takes it; leave it", "--checkpoint=best"),
    "a model of a run": Case(["evaluate", ".", MODEL], "--model is given, but only --weights"),
    "the size of a run": Case(
        ["evaluate", ".", "--image_size=32"], "only --weights and --function"
    ),
    "heads of a function": function("--num_heads is given, but only", "pixels:f", "--num_heads=2"),
    "weights without a model": Case(
        ["evaluate", "--weights=w.npz"], "--weights needs --model=NAME"
    ),
    "weights of an unknown model": file("'deit_tny' is unknown", "--model=deit_tny"),
    "weights that are not there": Case(["evaluate", "--weights=w.npz", MODEL], "no weight file"),
    "weights without their heads": file("shapes don't show heads: give --num_heads"),
    "heads that don't divide the width": file("model.num_heads 3 does not", "--num_heads=3"),
    "heads below 0": file("--num_heads is -2; it must be", "--num_heads=-2"),
    "weights of another family": file(
        "are not those of convit_tiny; .* a ViT", "--model=convit_tiny"
    ),
    "a size that the patch doesn't divide": file(
        "data.image_size 30", "--num_heads=2", "--image_size=30"
    ),
    "a size below 0": file("--image_size is -4; it must be", "--image_size=-4"),
    "a mean of two channels": file(
        "take images of 3 channels, and --mean has 2", "--num_heads=2", "--mean=0.5,0.5"
    ),
    "weights of one channel without a mean": file(
        "take images of 1 channel, and ImageNet's normalisation, .*'digits', has 3 .*--mean and",
        "--num_heads=2",
        "--data=digits",
        prepare=grey,
    ),
    "a mean of 0 to 255": file("data.mean is", "--num_heads=2", "--mean=120,120,120"),
    "a mean of words": file("invalid fraction value: 'a'", "--mean=a,b,c"),
    "a normalisation other than the file's": file(
        "--mean is 0.4,0.4,0.4, but the file itself normalises by 0.5,0.5,0.5",
        "--num_heads=2",
        "--mean=0.4,0.4,0.4",
        prepare=wrapped("model.", **STATISTICS),
    ),
    "half a normalisation": file(
        "unexpected: normalize.mean",
        "--num_heads=2",
        prepare=wrapped(**{"normalize.mean": STATISTICS["normalize.mean"]}),
    ),
    "weights of other classes than the data": file(
        "digits.* has 10 classes, but the model 3", "--num_heads=2", "--data=digits"
    ),
    "an export as weights": Case(
        ["evaluate", "--weights=.", MODEL],
        "an export or a work directory.*run 'vit-at evaluate .', without",
        lambda folder: (folder / "model.json").write_text("{}"),
    ),
    "a run from an export, with the scale of its attention": Case(
        ["train", "digits_sgd", "--config.model.pretrained=.", "--config.model.qk_scale=0.1"],
        "model.qk_scale is 0.1, or 0.1, but the weights of .* need 0.1768; set --config",
        lambda folder: shutil.copytree(PACKAGED / "digits_deit_64x2", folder, dirs_exist_ok=True),
        slow=True,
    ),
    "unknown data": file("TFDS has no data set 'cifar11'", "--num_heads=2", "--data=cifar11"),
    "results below a file": file(
        "no file can be written to w.safetensors .File exists.; choose another --workdir",
        "--num_heads=2",
        "--data=npy:x.npy",
        "--workdir=w.safetensors",
        prepare=lambda folder: (
            wrapped()(folder),
            np.save(folder / "x.npy", PIXELS),
            np.save(folder / "labels.npy", np.arange(10) % 3),
        ),
    ),
    "a function without a module": function("write MODULE:NAME", "f"),
    "a function in a path": function("write MODULE:NAME", "./pixels.py:f"),
    "a module that is not there": function("'nothing' can't be imported", "nothing:f"),
    "a module that fails": function("No module named 'a_module_that", "broken:f"),
    "a function that is not there": function("has no function 'g'", "pixels:g"),
    "a number as a function": function("has no function 'NUMBER'", "pixels:NUMBER"),
    "a function without logits": function(r"gives \(8, 32, 32, 3\)", "pixels:f"),
    "a function of NaN": function(
        "'pixels:not_finite', which gives NaN or infinity for 8 of 8", "pixels:not_finite"
    ),
    "a function of batch statistics": function(
        "'pixels:of_batch', but the logits of an image depend on the other", "pixels:of_batch"
    ),
    "images that are no bytes": npy(
        "x.npy holds float64", np.zeros((4, 8, 8, 3)), np.zeros(4, int)
    ),
    "images of 4 channels": npy("x.npy holds uint8", np.zeros((4, 8, 8, 4), np.uint8), np.zeros(4)),
    "fewer labels than images": npy("has 10 images and", PIXELS, np.zeros(9, int)),
    "labels that are no numbers": npy("labels.npy holds float64", PIXELS, np.zeros(10)),
    "images of objects": npy("can't be read as an .npy", np.array([None]), np.zeros(1, int)),
    "a severity of 6": npy("no split 'severity6'", PIXELS, np.arange(10) % 3, "severity6"),
    "severities of 9 images": npy("no split 'severity1'", PIXELS[:9], np.arange(9), "severity1"),
    "other classes than the run's": Case(
        ["evaluate", "run", "--data=npy:x.npy"],
        "x.npy test has 12 classes, but the model 10",
        lambda folder: (
            calls.a_run(folder),
            np.save(folder / "x.npy", PIXELS[..., 0]),
            np.save(folder / "labels.npy", np.arange(10) + 2),
        ),
    ),
}
