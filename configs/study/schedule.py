"""Which learning-rate schedule? The paper drops the rate twice, close to the end.

vit-at sweep configs/study/schedule.py:cpu
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def _schedule(name: str) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.optimizer.schedule = name
        if name == "cyclic":
            config.optimizer.warmup_epochs = config.epochs / 4  # where its peak is

    return change


OWN = {name: _schedule(name) for name in ("step", "cosine", "cyclic", "constant")}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("schedule", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in OWN:
        base.over_seeds(add, variants)
