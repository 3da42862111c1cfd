"""Lists the recipes, with what a run costs and the variants of each.

    vit-at recipes                           # a line each
    vit-at recipes digits_sgd                # all that its file says

Cost: operations of the training of a run, a multiplication and addition counted as two. 1 EFLOP, at
100 TFLOP a second, is about three hours.
"""

import argparse
import types
from collections.abc import Sequence

from vit_at import configs
from vit_at.configs import common
from vit_at.configs.study import base
from vit_at.console import with_prefix
from vit_at.errors import Parser, one_sentence_errors
from vit_at.reporting.scaling import cost_of


def summary(name: str) -> str:
    """A recipe's first line, cost and variants; a study's cost is that of its smallest size."""
    module, cost = configs.find(name), cost_of(configs.load(name))
    about = [
        f"{with_prefix(cost.training_flops)}FLOP a run, {with_prefix(cost.parameters)} weights"
    ]
    if own := own_variants(name, module):
        about.append(f"variants {', '.join(own)}")
    if hasattr(module, "sweep"):
        about.append("has a sweep")
    return f"{name:<20} {headline(module)}\n{'':<20} {'; '.join(about)}"


def headline(module: types.ModuleType) -> str:
    """The first line of a recipe's docstring."""
    return (module.__doc__ or "no docstring").splitlines()[0]


def own_variants(name: str, module: types.ModuleType) -> list[str]:
    """The variants that a recipe has besides those of all recipes; the sizes of a study first."""
    sizes = base.SIZES if name.startswith("study/") else ()
    return [*sizes, *getattr(module, "OWN", ())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="default: a line for each")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at recipes", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        for name in options.names:
            print(f"{summary(name)}\n\n{configs.find(name).__doc__}")
        if not options.names:
            print("\n".join(map(summary, configs.names())))
            everywhere = [f"{v}=NAME" if v in common.TAKES_VALUE else v for v in common.VARIANTS]
            print(f"\nEvery recipe has the variants {', '.join(everywhere)}:")
            print("vit-at train cifar10_sgd:model=deit_tiny_patch16_224,ard_prm")
    return 0
