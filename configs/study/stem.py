"""Convolutions or patches before the blocks? Singh, Croce and Hein 2023: convolutions.

    vit-at sweep study/natural:small && vit-at sweep study/stem:small

At :small each starts from natural training of its own, at other sizes from scratch. Patches are
cheaper and get a third more epochs, which takes a little longer than the convolutions do.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs import common
from vit_at.configs.study import base


def _patch(config: ConfigDict) -> None:
    base.patch(config)
    config.epochs += config.epochs // 3


def _conv(config: ConfigDict) -> None:
    config.model.stem = "conv"


def _without_published(config: ConfigDict) -> None:
    """Published weights are of patches: at the larger sizes, both start from scratch."""
    if config.model.pretrained != base.NATURAL.format("default"):
        common.VARIANTS["scratch"](config)


OWN = {"conv": _conv, "patch": _patch}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("stem", variants, OWN, _without_published)


def sweep(add: Callable[..., None]) -> None:
    for variants in OWN:
        base.over_seeds(add, variants)
