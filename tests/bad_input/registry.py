"""Models by name: names that nothing has, and sources that are no model."""

from bad_input.case import Case
from bad_input.exports import OURS, TRAINED, files

import vit_at

NEAREST = (
    r"no packaged model of this name; the nearest are (cifar10_convit_96x4, )?digits_deit_64x2"
)

CASES = {
    "evaluate a misspelt name": Case(["evaluate", "digits_deit"], NEAREST),
    "export a misspelt name": Case(["export", "digits_deit", "--output=o"], NEAREST),
    "load a misspelt name": Case(lambda _: vit_at.load("digits_deit64x2"), NEAREST),
    "load nothing": Case(lambda _: vit_at.load(""), "config.json"),
    "load a file": Case(
        lambda _: vit_at.load("model.safetensors"),
        "model.safetensors is no work directory",
        files(OURS),
    ),
    "load an export with other weights": Case(
        lambda folder: vit_at.load(folder),
        "model.safetensors is not the file that model.json describes",
        files(OURS | {"model.safetensors": "v", "model.json": TRAINED}),
    ),
    "load a packaged model's other checkpoint": Case(
        lambda _: vit_at.load("digits_deit_64x2", "last"),
        "digits_deit_64x2 is an export, which holds one checkpoint; leave 'last' out",
    ),
    "load a malformed hub name": Case(
        lambda _: vit_at.load("hf:owner"), "'hf:owner' is no name; write hf:OWNER/NAME"
    ),
    "list an architecture among the trained models": Case(
        ["models", "--robust", "cifar10_convit"], "the nearest are cifar10_convit_96x4"
    ),
    "start from a misspelt name": Case(
        ["train", "digits_sgd:smoke", "--config.model.pretrained=digits_deit"],
        NEAREST,
        slow=True,
    ),
}
