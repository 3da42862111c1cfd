"""Natural training of size :small, the weights that the other studies start from.

    vit-at sweep study/natural:small

``patch`` has one linear map of patches in place of the convolutions; ``half`` sees half of the
training images, as often as the others see all.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs import common
from vit_at.configs.study import base


def _natural(config: ConfigDict) -> None:
    common.pretrain(config)
    config.epochs *= 2
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 1e-3
    config.optimizer.weight_decay = 0.05


OWN = {"patch": base.patch, "half": base.half}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("natural", variants, OWN, _natural)


def sweep(add: Callable[..., None]) -> None:
    for variants in ("", *OWN):
        add(variants)
