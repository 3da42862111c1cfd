"""SGD, AdamW or Muon? The paper: SGD, clearly; it does not know Muon.

    vit-at sweep configs/study/optimizer.py:cpu

AdamW with its usual decoupled weight decay, cosine schedule and warm-up, at three rates; Muon with
the same at one.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def _adamw(config: ConfigDict) -> None:
    config.optimizer.name, config.optimizer.schedule = "adamw", "cosine"
    config.optimizer.weight_decay, config.optimizer.warmup_epochs = 0.05, 1.0


def _muon(config: ConfigDict) -> None:
    _adamw(config)
    config.optimizer.name, config.optimizer.momentum = "muon", 0.95


OWN = {"adamw": _adamw, "muon": _muon}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("optimizer", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for rate in (0.1, 0.03):
        base.over_seeds(add, optimizer__learning_rate=rate)
    for rate in (2e-3, 5e-4, 1e-4):
        base.over_seeds(add, "adamw", optimizer__learning_rate=rate)
    base.over_seeds(add, "muon", optimizer__learning_rate=6e-3)
