"""Config strings: ``--config=configs/cifar10_trades.py:model=deit_small_patch16_224,ard_prm``.

Each comma-separated item is a variant from VARIANTS: a bare word, or a word with a value.
"""

import difflib
from collections.abc import Callable

from ml_collections import ConfigDict


def _model(config: ConfigDict, name: str) -> None:
    config.model.name = name


def _ard(config: ConfigDict) -> None:
    config.masking.ard = True


def _prm(config: ConfigDict) -> None:
    config.masking.prm = True


def _ard_prm(config: ConfigDict) -> None:
    _ard(config)
    _prm(config)


def _smoke(config: ConfigDict) -> None:
    """The same path at toy size, in seconds and with no data to prepare: a check, not a result."""
    config.data.name, config.data.dir = "digits", ""
    config.data.train_split, config.data.test_split = "train[:160]", "test[:48]"
    config.data.validation_examples = 32
    config.data.image_size, config.model.patch_size = 16, 4
    config.model.embed_dim, config.model.depth, config.model.num_heads = 32, 2, 2
    config.masking.patch_size = 0
    config.epochs, config.batch_size, config.eval.batch_size = 2, 32, 16
    config.masking.warmup_epochs = config.threat.eps_warmup_epochs = 1.0
    config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 1.0)
    config.threat.steps = 2
    config.eval.every_epochs = 1
    config.eval.validation_attack = "pgd-2"
    config.eval.attacks = "clean,cw-2,pgd-2"
    config.log_every_steps = 1


def _natural(config: ConfigDict) -> None:
    """The same budget without an attack: what robustness is compared with."""
    config.objective = "natural"


VARIANTS: dict[str, Callable[..., None]] = {
    "model": _model,
    "ard": _ard,
    "prm": _prm,
    "ard_prm": _ard_prm,
    "natural": _natural,
    "smoke": _smoke,
}
TAKES_VALUE = frozenset({"model"})


def apply_variants(config: ConfigDict, variants: str) -> ConfigDict:
    """Applies a config string and adds it to the config's name.

    Raises:
      ValueError: an item that is no variant, or lacks or does not take a value.
    """
    for item in filter(None, variants.split(",")):
        word, equals, value = item.partition("=")
        if word not in VARIANTS:
            near = difflib.get_close_matches(word, VARIANTS, n=2) or sorted(VARIANTS)
            raise ValueError(f"config variant '{word}' is unknown; use {' or '.join(near)}")
        if (word in TAKES_VALUE) != bool(value):
            usage = f"{word}=NAME" if word in TAKES_VALUE else f"{word} without a value"
            raise ValueError(f"config variant '{item}' is malformed; write {usage}")
        VARIANTS[word](config, *([value] if equals else []))
        config.name += "-" + (value or word)
    return config
