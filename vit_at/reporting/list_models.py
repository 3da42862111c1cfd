"""Lists the models by timm's name, with parameters and cost; or the trained models of the package.

    vit-at models                            # all of them
    vit-at models deit_tiny_patch16_224 swin_tiny_patch4_window7_224
    vit-at models --robust                   # those that vit_at.load("NAME") gives

GFLOP: of one image's forward pass at the default size, 224 pixels, two for a multiplication and
addition; parameters: with a head for 1000 classes. Accuracies are in per cent; n: test images.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import jax

from vit_at import models
from vit_at.errors import Parser, UserError, nearest, one_sentence_errors
from vit_at.workdir import registry
from vit_at.workdir.results import in_255ths


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


def describe_trained(name: str) -> str:
    """The lines of a packaged model: what it is, and each accuracy with its protocol.

    Raises:
      UserError: an unknown name.
    """
    name = registry.BEST.get(name, name)
    if name not in registry.NAMES:
        near = nearest(name, [*registry.NAMES, *registry.BEST])
        raise UserError(f"no packaged model is named '{name}'; the nearest are {near}")
    loaded = registry.load(registry.PACKAGED / name)
    threat, model = loaded.config.threat, loaded.config.model
    others = [other for other, best in registry.BEST.items() if best == name]
    lines = [
        ", or ".join([name, *others]),
        f"  {model.name}, {count_parameters(loaded.model):,} parameters, trained on "
        f"{loaded.config.data.name} against {threat.norm} {in_255ths(threat.eps)}",
    ]
    for record in loaded.record:
        protocol = record["protocol"]
        under = f"{protocol['norm']} {in_255ths(protocol['eps'])}" if "norm" in protocol else ""
        lines.append(
            f"  {record['attack']:<12} {100 * record['accuracy']:6.2f}  n = "
            f"{protocol['num_examples']:<6} {under:<12} weights {protocol['weights']['digest']}"
        )
    notes = {note: None for record in loaded.record for note in record.get("notes", ())}
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("names", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--robust", action="store_true", help="the trained models of the package")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each model; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at models", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        names, line = (
            (registry.NAMES, describe_trained) if options.robust else (models.NAMES, describe)
        )
        for name in options.names or names:
            print(line(name))
    return 0
