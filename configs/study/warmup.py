"""How long do ARD and PRM mask? n_w of the paper, 10 of 40 epochs there; 0: not at all.

vit-at sweep configs/study/warmup.py:cpu
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def get_config(variants: str = "") -> ConfigDict:
    return base.start("warmup", variants)


def sweep(add: Callable[..., None]) -> None:
    base.over_seeds(add)
    for epochs in (5.0, 10.0, 20.0, 40.0):
        base.over_seeds(add, "ard_prm", masking__warmup_epochs=epochs)
