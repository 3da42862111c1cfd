"""What a recipe costs on a TPU slice, on paper: compute against communication.

    python -m vit_at.reporting.scaling configs/imagenet_vit_b.py [--chip=v6e] [--utilisation=0.4]

An update computes F operations (``metrics.step_flops``, nearly all of them the attack's) and sends
the gradient of P float32 parameters around once, which is an all-reduce ('replicated'), or a
gathering of the parameters and a reduce-scatter of the gradient ('fsdp'), of as many bytes. On N
chips, of C operations and W bytes a second, of which a share u is used,

    compute = F / (N u C)        send = 2 (N-1)/N 4 P / W
    efficiency = compute / (compute + send)

which assumes that nothing overlaps: a lower bound. These are estimates from data sheets; u is an
assumption, and no figure here has been measured on such a slice.
"""

import argparse
import collections
import functools
import math
import re
import sys
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from vit_at import models
from vit_at.attacks import Threat
from vit_at.errors import UserError, one_sentence_errors
from vit_at.evaluation.protocol import parse_attacks
from vit_at.models.build import build
from vit_at.reporting.sweep import load_recipe
from vit_at.training import metrics

FLOAT32 = 4  # bytes
_FULL_PRECISION_PASSES = 6  # bfloat16 products that make one of float32
# (training, test) images and classes of the data sets that recipes name.
_DATA = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenette/full-size": (12_894, 500, 10),
    "imagenet2012": (1_281_167, 50_000, 1000),
    "digits": (1438, 359, 10),
}


class Chip(NamedTuple):
    """Data sheet: bfloat16 operations a second, bytes a second into all links together, and the
    number of chips from which the torus is closed, so that a ring uses all of the links.
    """

    flops: float
    link: float
    torus: int

    def bandwidth(self, chips: int) -> float:
        """Bytes a second of a chip in a collective over so many; half where the torus is open."""
        return self.link if chips >= self.torus else self.link / 2


CHIPS = {"v5e": Chip(197e12, 200e9, 256), "v6e": Chip(918e12, 400e9, 256)}


class Cost(NamedTuple):
    """Of a recipe: parameters, operations of an update and of a whole run, updates, batch size."""

    parameters: int
    step_flops: float
    training_flops: float
    evaluation_flops: float
    steps: int
    batch_size: int


def cost_of(config: ConfigDict) -> Cost:
    """What a recipe computes; evaluation counts as the bfloat16 products that float32 takes.

    Raises:
      UserError: a data set whose size is not known here.
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
    """Forward passes, or as much work, for one image: 2 an attack step and one at the end."""
    parsed = parse_attacks(attacks, Threat.of(config.threat))
    return sum(1 + 2 * a.threat.steps * (a.kind in ("pgd", "cw")) for a in parsed)


def sent_bytes(parameters: int, chips: int) -> float:
    """Bytes that a chip sends in an update."""
    return 2 * (chips - 1) / chips * FLOAT32 * parameters


def efficiency(cost: Cost, chips: int, chip: Chip, utilisation: float) -> float:
    """Share of the time that computes; see the module's docstring."""
    compute = cost.step_flops / (chips * utilisation * chip.flops)
    return compute / (compute + sent_bytes(cost.parameters, chips) / chip.bandwidth(chips))


def chip_hours(flops: float, chip: Chip, utilisation: float) -> float:
    """Chip-hours at full efficiency."""
    return flops / (utilisation * chip.flops) / 3600


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")
_ARRAY = re.compile(r"(f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]")
_SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def collective_bytes(hlo: str) -> dict[str, int]:
    """{kind: bytes of the results} of the collectives that a compiled program runs, from its text.

    What stands in a loop counts as often as the loop is known to run.
    """
    texts = {name: text for _, name, text in _COMPUTATION.findall(hlo)}
    (entry,) = (name for is_entry, name, _ in _COMPUTATION.findall(hlo) if is_entry)

    @functools.cache
    def of_computation(name: str) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for line in texts.get(name, "").splitlines():
            if found := _COLLECTIVE.search(line):
                total[found[2]] += _nbytes(found[1])
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                for kind, size in of_computation(called).items():
                    total[kind] += size * (int(trips[1]) if trips else 1)
        return total

    return dict(of_computation(entry))


def _nbytes(shapes: str) -> int:
    return sum(
        _SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(shapes)
    )


def report(config: ConfigDict, chip_name: str, utilisation: float) -> str:
    """A recipe's cost and its efficiency on slices, as lines of text."""
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
    parser = argparse.ArgumentParser(
        prog="python -m vit_at.reporting.scaling",
        description="What recipes cost on a TPU slice, on paper.",
    )
    parser.add_argument("recipes", nargs="+", help="such as configs/imagenet_vit_b.py")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed share of the peak")
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        for recipe in options.recipes:
            print(report(load_recipe(recipe), options.chip, options.utilisation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
