#!/usr/bin/env python3
"""Estimates what a recipe costs on a TPU slice: compute and communication.

    python launch/cost.py imagenet_vit_b [--chip=v6e] [--utilisation=0.4] [--robust=0.4]

An update computes F operations (``metrics.step_flops``, most of them the attack's) and all-reduces
the gradient of P float32 parameters. With ``sharding=fsdp`` it gathers the parameters and
reduce-scatters the gradient, which sends as many bytes. On N chips with C operations and W bytes a
second, and a share u of C in use,

    compute = F / (N u C)        send = 2 (N-1)/N 4 P / W
    efficiency = compute / (compute + send)

This is a lower bound, as it assumes no overlap. C and W are from data sheets, u is an assumption,
and nothing here has been measured on such a slice. AutoAttack's cost is that of the images that
withstand it, an assumed share: the others cost little (of 256 CIFAR-10 images, one of 100 passes).
"""

import sys
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_at import configs
from vit_at.attacks import Threat
from vit_at.config import evaluation_threat
from vit_at.console import with_prefix
from vit_at.errors import Parser, UserError, one_sentence_errors
from vit_at.evaluation.protocol import parse_attacks
from vit_at.reporting.list_recipes import Cost, cost_of
from vit_at.workdir.results import AUTOATTACK

FLOAT32 = 4  # bytes
_FULL_PRECISION_PASSES = 6  # bfloat16 products that make one of float32
# Of an image that withstands all: 100 steps of APGD and of 9 targets each, 100 of FAB for 9 targets
# with a forward pass to check the point, and Square's 5,000 queries.
_AUTOATTACK_PASSES = 2 * (100 + 900) + 3 * 900 + 5000
TEST_IMAGES = {
    "cifar10": 10_000,
    "cifar100": 10_000,
    "imagenette/full-size": 500,
    "imagenet2012": 50_000,
    "digits": 359,
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


def evaluation_flops(config: ConfigDict, forward_flops: float, robust: float) -> float:
    """Operations of all evaluations of a run; a float32 product counts as six bfloat16 products.

    robust: the share of the test images that withstand AutoAttack.
    """
    validation = config.data.validation_examples
    tested = config.eval.num_examples or TEST_IMAGES.get(config.data.name)
    if tested is None:
        raise UserError(
            f"how many test images {config.data.name} has is not known; give a recipe whose "
            "eval.num_examples says how many are tested"
        )
    images = tested * _passes(config, config.eval.attacks, robust)
    if config.eval.every_epochs:
        often, attacks = config.epochs // config.eval.every_epochs, config.eval.validation_attack
        images += often * validation * _passes(config, f"clean,{attacks}", robust)
    return images * forward_flops * _FULL_PRECISION_PASSES


def _passes(config: ConfigDict, attacks: str, robust: float) -> float:
    """Work for one image in forward passes: 2 for each attack step and 1 at the end."""
    found = 0.0
    for attack in parse_attacks(attacks, Threat.of(evaluation_threat(config))):
        found += 1 + 2 * attack.threat.steps * (attack.kind in ("pgd", "cw"))
        found += robust * _AUTOATTACK_PASSES * (attack.kind == AUTOATTACK)
    return found


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


def report(config: ConfigDict, chip_name: str, utilisation: float, robust: float) -> str:
    """A recipe's cost, and its efficiency on slices of 8, 64 and 256 chips, as text."""
    chip, cost, batch_size = CHIPS[chip_name], cost_of(config), config.batch_size
    training = chip_hours(cost.steps * cost.step_flops, chip, utilisation)
    operations = evaluation_flops(config, cost.forward_flops, robust)
    evaluation = chip_hours(operations, chip, utilisation)
    lines = [
        f"{config.name}: {cost.parameters:,} parameters, {cost.steps:,} updates of "
        f"{with_prefix(cost.step_flops)}FLOP, batch {batch_size}",
        f"chip-hours on {chip_name} at {utilisation:.0%} of its peak, estimated: "
        f"{training:.2g} training, {evaluation:.2g} evaluation, if {robust:.0%} of the images "
        "are robust",
        "chips  images a chip  sent MB  efficiency",
    ]
    for chips in (8, 64, 256):
        if batch_size % chips:
            lines.append(f"{chips:>5}  the batch of {batch_size} does not divide")
            continue
        share = efficiency(cost, chips, chip, utilisation)
        megabytes = sent_bytes(cost.parameters, chips) / 1e6
        lines.append(f"{chips:>5}  {batch_size // chips:>13}  {megabytes:>7.0f}  {share:>10.0%}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints ``report`` for each recipe; returns the exit status."""
    parser = Parser(prog="launch/cost.py", description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="such as imagenet_vit_b")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed share of the peak")
    parser.add_argument("--robust", type=float, default=0.4, help="assumed AutoAttack accuracy")
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        for recipe in options.recipes:
            print(report(configs.load(recipe), options.chip, options.utilisation, options.robust))
    return 0


if __name__ == "__main__":
    sys.exit(main())
