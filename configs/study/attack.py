"""Which training attack, at equal cost? PGD-10 as in the paper, PGD-2, and N-FGSM.

    vit-at sweep study/natural:small && vit-at sweep study/attack:small

The fewer passes an attack takes, the more epochs it gets: those of the size times the passes of its
own attack (PGD-2 at :small, else PGD-10) over these, rounded to whole epochs.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def _attack(steps: int, step_size: float, start: str = "random") -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        threat = config.threat
        budget = config.epochs * (2 * threat.steps + 3)  # a gradient costs two forward passes
        config.epochs = max(1, round(budget / (2 * steps + 3)))
        threat.steps, threat.step_size, threat.start = steps, step_size * threat.eps, start
        config.eval.threat.step_size = threat.eps / 4

    return change


OWN = {
    "pgd10": _attack(10, 1 / 4),
    "pgd2": _attack(2, 5 / 8),
    "nfgsm": _attack(1, 1.0, "noise"),
}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("attack", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in OWN:
        base.over_seeds(add, variants)
