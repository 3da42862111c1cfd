"""Lists the models by timm's name, with parameters and cost.

    vit-at models                            # all of them
    vit-at models deit_tiny_patch16_224 swin_tiny_patch4_window7_224

GFLOP: of one image's forward pass at the default size, 224 pixels, two for a multiplication and
addition; parameters: with a head for 1000 classes.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import jax

from vit_at import models
from vit_at.errors import Parser, one_sentence_errors


def count_parameters(model: Any) -> int:
    """The number of a model's parameters; nothing is allocated."""
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def describe(name: str) -> str:
    """The line of one model.

    Raises:
      UserError: an unknown name.
    """
    model = models.create(name, num_classes=1000)
    millions = count_parameters(model) / 1e6
    return (
        f"{name:<36} {millions:>7.1f} M  {model.forward_flops() / 1e9:>6.1f} GFLOP  "
        f"{model.image_size} px, patch {model.patch_size}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("names", nargs="*", metavar="MODEL", help="default: all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each model; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at models", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        for name in options.names or models.NAMES:
            print(describe(name))
    return 0
