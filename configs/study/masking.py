"""Vanilla, ARD, PRM or both? The paper: both together are best.

vit-at sweep configs/study/masking.py:cpu          # of AT
vit-at sweep configs/study/masking.py:cpu,trades   # likewise of TRADES, and of MART
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def _other(objective: str) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.objective = objective
        config.mixing.probability = 0.0  # they need plain labels

    return change


OWN = {"trades": _other("trades"), "mart": _other("mart")}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("masking", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in ("", "ard", "prm", "ard_prm"):
        base.over_seeds(add, variants)
