"""How long do ARD and PRM mask? n_w of the paper, 10 of 40 epochs there; 0: not at all.

vit-at sweep configs/study/warmup.py:cpu
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs import common
from vit_at.configs.study import base


def _warmup(epochs: float) -> Callable[[ConfigDict], None]:
    """So many epochs of 40, or as large a share of a training of another length."""

    def change(config: ConfigDict) -> None:
        common.VARIANTS["ard_prm"](config)
        config.masking.warmup_epochs = epochs / 40 * config.epochs

    return change


OWN = {f"warmup_{epochs}": _warmup(float(epochs)) for epochs in (5, 10, 20, 40)}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("warmup", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in ("", *OWN):
        base.over_seeds(add, variants)
