"""How much weight decay? Adversarial training of CNNs likes 5e-4; the paper takes 1e-4 for ViTs.

vit-at sweep configs/study/weight_decay.py:cpu
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def get_config(variants: str = "") -> ConfigDict:
    return base.start("weight_decay", variants)


def sweep(add: Callable[..., None]) -> None:
    for decay in (0.0, 1e-4, 2e-4, 5e-4, 1e-3):
        base.over_seeds(add, optimizer__weight_decay=decay)
