"""Lists the recipes, with what a run costs and the variants of each.

    vit-at recipes                           # a line each
    vit-at recipes digits_sgd                # all that its file says

Cost: operations of the training of a run, a multiplication and addition counted as two. 1 EFLOP, at
100 TFLOP a second, is about three hours.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_at import configs
from vit_at.configs import common
from vit_at.configs.study import base
from vit_at.console import with_prefix
from vit_at.errors import Parser, UserError, one_sentence_errors
from vit_at.models import build
from vit_at.reporting.list_models import count_parameters
from vit_at.training import phases

# Training images and classes of the recipes' data sets.
_DATASETS = {
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "imagenette/full-size": (12_894, 10),
    "imagenet2012": (1_281_167, 1000),
    "digits": (1438, 10),
    "folder:images": (5_000, 10),  # an example
}


class Cost(NamedTuple):
    """A recipe's parameters, updates, operations of one image's forward pass and of an update.

    Of an update: on average over the run.
    """

    parameters: int
    steps: int
    forward_flops: float
    step_flops: float


def cost_of(config: ConfigDict) -> Cost:
    """The cost of training a recipe.

    Raises:
      UserError: the size of the data set is not known here.
    """
    name, batch_size = config.data.name, config.batch_size
    if name not in _DATASETS:
        known = ", ".join(_DATASETS)
        raise UserError(f"the size of data set '{name}' is not known; known are {known}")
    examples, classes = _DATASETS[name]
    model = build(config, classes, "float32")
    forward = model.forward_flops()
    steps = config.epochs * ((examples - config.data.validation_examples) // batch_size)
    step = phases.mean_step_flops(config, model)
    return Cost(count_parameters(model), steps, forward, step)


def summary(name: str) -> str:
    """A recipe's first line, cost and variants; a study's cost is that of its smallest size.

    The variants are those that not all recipes have.
    """
    module, cost = configs.find(name), cost_of(configs.load(name))
    flops, weights = with_prefix(cost.steps * cost.step_flops), with_prefix(cost.parameters)
    about = [f"{flops}FLOP a run, {weights} weights"]
    sizes = base.SIZES if name.startswith("study/") else ()
    if variants := [*sizes, *getattr(module, "OWN", ())]:
        about.append(f"variants {', '.join(variants)}")
    if hasattr(module, "sweep"):
        about.append("has a sweep")
    headline = (module.__doc__ or "no docstring").splitlines()[0]
    return f"{name:<20} {headline}\n{'':<20} {'; '.join(about)}"


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
