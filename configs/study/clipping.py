"""Is the gradient to be clipped, and where? The paper clips its norm at 1.

vit-at sweep configs/study/clipping.py:cpu
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def get_config(variants: str = "") -> ConfigDict:
    return base.start("clipping", variants)


def sweep(add: Callable[..., None]) -> None:
    for norm in (0.0, 0.5, 1.0, 5.0):
        base.over_seeds(add, optimizer__clip_norm=norm)
