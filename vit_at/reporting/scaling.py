"""Estimates what a recipe costs on a TPU slice: compute and communication.

    python -m vit_at.reporting.scaling configs/imagenet_vit_b.py [--chip=v6e] [--utilisation=0.4]

An update computes F operations (``metrics.step_flops``, most of them the attack's) and all-reduces
the gradient of P float32 parameters. With ``sharding=fsdp`` it gathers the parameters and
reduce-scatters the gradient, which sends as many bytes. On N chips with C operations and W bytes a
second, and a share u of C in use,

    compute = F / (N u C)        send = 2 (N-1)/N 4 P / W
    efficiency = compute / (compute + send)

This is a lower bound, as it assumes no overlap. C and W are from data sheets, u is an assumption,
and nothing here has been measured on such a slice.
"""

import math
import sys
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from vit_at import configs, models
from vit_at.attacks import Threat
from vit_at.errors import Parser, UserError, one_sentence_errors
from vit_at.evaluation.protocol import parse_attacks
from vit_at.models import build
from vit_at.training import metrics

FLOAT32 = 4  # bytes
_FULL_PRECISION_PASSES = 6  # bfloat16 products that make one of float32
# Training images, test images and classes of the recipes' data sets.
_DATA = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenette/full-size": (12_894, 500, 10),
    "imagenet2012": (1_281_167, 50_000, 1000),
    "digits": (1438, 359, 10),
}


class Chip(NamedTuple):
    """From the data sheet.

    flops: bfloat16 operations a second. link: bytes a second over all links. torus: the number of
    chips from which the torus is closed, so that a ring uses all links.
    """

    flops: float
    link: float
    torus: int

    def bandwidth(self, chips: int) -> float:
        """Bytes a second of a chip in a collective over ``chips``; half if the torus is open."""
        return self.link if chips >= self.torus else self.link / 2


CHIPS = {"v5e": Chip(197e12, 200e9, 256), "v6e": Chip(918e12, 400e9, 256)}


class Cost(NamedTuple):
    """A recipe's parameters, operations of an update and of a whole run, updates, batch size."""

    parameters: int
    step_flops: float
    training_flops: float
    evaluation_flops: float
    steps: int
    batch_size: int


def cost_of(config: ConfigDict) -> Cost:
    """The cost of a recipe; an evaluation's float32 products count as six bfloat16 products.

    Raises:
      UserError: the size of the data set is not known here.
    """
    if config.data.name not in _DATA:
        raise UserError(
            f"the size of data set '{config.data.name}' is not known; known are {', '.join(_DATA)}"
        )
    train, test, classes = _DATA[config.data.name]
    validation = config.data.validation_examples
    model = build(config, classes, "float32")
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    forward = model.forward_flops()
    step = metrics.step_flops(config.objective, forward, config.batch_size, config.threat.steps)
    steps = config.epochs * ((train - validation) // config.batch_size)
    images = test * _passes(config, config.eval.attacks)
    if config.eval.every_epochs:
        often = config.epochs // config.eval.every_epochs
        images += often * validation * _passes(config, f"clean,{config.eval.validation_attack}")
    return Cost(
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        step_flops=step,
        training_flops=steps * step,
        evaluation_flops=images * forward * _FULL_PRECISION_PASSES,
        steps=steps,
        batch_size=config.batch_size,
    )


def _passes(config: ConfigDict, attacks: str) -> int:
    """Work for one image in forward passes: 2 for each attack step and 1 at the end."""
    parsed = parse_attacks(attacks, Threat.of(config.threat))
    return sum(1 + 2 * a.threat.steps * (a.kind in ("pgd", "cw")) for a in parsed)


def sent_bytes(parameters: int, chips: int) -> float:
    """Bytes that a chip sends in one update."""
    return 2 * (chips - 1) / chips * FLOAT32 * parameters


def efficiency(cost: Cost, chips: int, chip: Chip, utilisation: float) -> float:
    """The share of the time spent on compute, as in the module's docstring."""
    compute = cost.step_flops / (chips * utilisation * chip.flops)
    return compute / (compute + sent_bytes(cost.parameters, chips) / chip.bandwidth(chips))


def chip_hours(flops: float, chip: Chip, utilisation: float) -> float:
    """Chip-hours at full efficiency."""
    return flops / (utilisation * chip.flops) / 3600


def report(config: ConfigDict, chip_name: str, utilisation: float) -> str:
    """A recipe's cost, and its efficiency on slices of 8, 64 and 256 chips, as text."""
    chip, cost = CHIPS[chip_name], cost_of(config)
    hours = [
        chip_hours(flops, chip, utilisation)
        for flops in (cost.training_flops, cost.evaluation_flops)
    ]
    lines = [
        f"{config.name}: {cost.parameters:,} parameters, {cost.steps:,} updates of "
        f"{metrics.with_prefix(cost.step_flops)}FLOP, batch {cost.batch_size}",
        f"chip-hours on {chip_name} at {utilisation:.0%} of its peak, estimated: "
        f"{hours[0]:.2g} training, {hours[1]:.2g} evaluation",
        "chips  images a chip  sent MB  efficiency",
    ]
    for chips in (8, 64, 256):
        if cost.batch_size % chips:
            lines.append(f"{chips:>5}  the batch of {cost.batch_size} does not divide")
            continue
        share = efficiency(cost, chips, chip, utilisation)
        megabytes = sent_bytes(cost.parameters, chips) / 1e6
        lines.append(
            f"{chips:>5}  {cost.batch_size // chips:>13}  {megabytes:>7.0f}  {share:>10.0%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints ``report`` for each recipe."""
    parser = Parser(
        prog="python -m vit_at.reporting.scaling",
        description="Estimates what recipes cost on a TPU slice.",
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", help="such as configs/imagenet_vit_b.py")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed share of the peak")
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        for recipe in options.recipes:
            print(report(configs.load(recipe), options.chip, options.utilisation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
