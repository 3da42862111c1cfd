"""The schema of a configuration.

``validate`` refuses unknown, out-of-range and contradictory values before any file is written, in
one sentence with the field, its value, the allowed values and the remedy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_at.errors import UserError, nearest

CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "model.stem": ("patch", "conv"),
    "sharding": ("replicated", "fsdp"),
    "threat.norm": ("linf", "l2", "l1"),
    "eval.threat.norm": ("", "linf", "l2", "l1"),
    "threat.start": ("random", "zero"),
    "optimizer.name": ("sgd", "adamw"),
    "optimizer.schedule": ("step", "cosine", "cyclic", "constant"),
    "eval.checkpoint": ("best", "last"),
}

# {allowed numbers in words: (their test, the fields)}
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "a whole number, 1 or more": (
        lambda v: v >= 1,
        "epochs batch_size accumulate_steps log_every_steps "
        "data.image_size threat.steps eval.batch_size checkpoint.keep",
    ),
    "a whole number, 0 or more": (
        lambda v: v >= 0,
        "seed model.patch_size model.embed_dim model.depth model.num_heads "
        "data.validation_examples data.crop_padding data.threads masking.patch_size "
        "eval.every_epochs eval.num_examples checkpoint.every_steps",
    ),
    "0 or more": (
        lambda v: v >= 0 and np.isfinite(v),
        "beta model.mlp_ratio model.qk_scale data.cache_gib mixing.mixup_alpha mixing.cutmix_alpha "
        "eval.threat.eps eval.threat.step_size threat.eps_warmup_epochs masking.warmup_epochs "
        "optimizer.learning_rate "
        "optimizer.weight_decay optimizer.clip_norm optimizer.warmup_epochs "
        "checkpoint.every_minutes",
    ),
    "from 0 to 1": (
        lambda v: 0 <= v <= 1,
        "mixing.probability mixing.cutmix_probability masking.keep_max optimizer.drop_factor",
    ),
    "from 0 up to but not including 1": (
        lambda v: 0 <= v < 1,
        "label_smoothing ema_decay model.drop_path optimizer.momentum optimizer.b1 optimizer.b2",
    ),
}

# Fields that older ``config.json`` files lack, with the value that describes those runs.
ADDED = {"sharding": "replicated", "model.remat": False, "checkpoint.every_steps": 0}
ADDED |= {"data.allow_overlap": False, "model.stem": "patch"}
ADDED |= {"eval.threat.norm": "", "eval.threat.eps": 0.0, "eval.threat.step_size": 0.0}


def with_added(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the fields of ADDED that it lacks."""
    flat = flatten(stored)
    return nested(flat | {field: v for field, v in ADDED.items() if field not in flat})


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first field whose value is not allowed.

    ``training.objectives.check`` also checks the objective, and what depends on it.
    """
    flat = flatten(config)
    if not config.name.strip():
        raise UserError("name is empty, but names the run and its directory; give it a word")
    for field, choices in CHOICES.items():
        value = flat[field]
        if value not in choices:
            raise UserError(
                f"{field} is '{value}', which is unknown; allowed are {', '.join(choices)} "
                f"(nearest: {nearest(str(value), choices, 1)})"
            )
    for allowed, (fits, fields) in _RANGES.items():
        for field in fields.split():
            if not fits(flat[field]):
                raise UserError(f"{field} is {flat[field]}; it must be {allowed}")
    _validate_threat(config)
    _validate_data(config)
    _validate_schedule(config)
    _validate_combinations(config)


def _validate_threat(config: ConfigDict) -> None:
    for name, threat in (("threat", config.threat), ("eval.threat", evaluation_threat(config))):
        values = len(config.data.mean) * config.data.image_size**2
        _validate_ball(name, threat, values)


def evaluation_threat(config: ConfigDict) -> ConfigDict:
    """The threat of validation and evaluation: ``threat``, with what ``eval.threat`` changes.

    Raises:
      UserError: the norm is another one than in training, and eps or step_size is not given.
    """
    threat, own = config.threat.copy_and_resolve_references().unlock(), config.eval.threat
    changes = {field: own[field] for field in ("norm", "eps", "step_size") if own[field]}
    if changes.get("norm", threat.norm) != threat.norm and len(changes) < 3:
        raise UserError(
            f"eval.threat.norm is {own.norm}, but threat.norm is {threat.norm}, whose eps means "
            "something else; give eval.threat.eps and eval.threat.step_size too"
        )
    threat.update(changes)
    return threat


def _validate_ball(name: str, threat: ConfigDict, values: int) -> None:
    """values: of an image."""
    if threat.norm == "linf" and not 0 < threat.eps <= 1:
        meant = f"did you mean {threat.eps:g}/255?" if threat.eps > 1 else "write such as 8/255"
        raise UserError(
            f"{name}.eps is {threat.eps:g}; eps is in pixel units of images in [0, 1], so it must "
            f"be over 0 and at most 1: {meant}"
        )
    if threat.norm == "l2" and not 0 < threat.eps <= 100:
        raise UserError(
            f"{name}.eps is {threat.eps:g}; an L2 eps is a length in pixel units of images in "
            "[0, 1] and must be over 0 and at most 100, for example 0.5"
        )
    if threat.norm == "l1" and not 0 < threat.eps <= values:
        raise UserError(
            f"{name}.eps is {threat.eps:g}; an L1 eps is a sum over the values of an image in "
            f"[0, 1] and must be over 0 and at most their number, {values}, for example 12"
        )
    if not 0 < threat.step_size <= 2 * threat.eps:
        raise UserError(
            f"{name}.step_size is {threat.step_size:g}; it must be over 0 and at most twice "
            f"{name}.eps ({threat.eps:g}), both in pixel units: the recipe's is a quarter of eps"
        )


def _validate_data(config: ConfigDict) -> None:
    data = config.data
    if len(data.mean) != len(data.std) or len(data.mean) not in (1, 3):
        raise UserError(
            f"data.mean has {len(data.mean)} channels and data.std {len(data.std)}; both must have "
            "1 (grey) or 3 (colour)"
        )
    if min(data.std) <= 0:
        raise UserError(f"data.std is {data.std}; every channel must be over 0")
    if data.crop_padding >= data.image_size:
        raise UserError(
            f"data.crop_padding is {data.crop_padding}, so a crop may show nothing of the "
            f"{data.image_size}-pixel image; it must be less than data.image_size"
        )
    patch = config.masking.patch_size
    if config.masking.prm and patch and data.image_size % patch:
        raise UserError(
            f"masking.patch_size {patch} does not divide data.image_size {data.image_size}; "
            "choose one that does, or 0 for the model's"
        )
    if config.eval.checkpoint == "best" and not (
        data.validation_examples and config.eval.every_epochs
    ):
        raise UserError(
            "eval.checkpoint is 'best', which needs validation, but data.validation_examples is "
            f"{data.validation_examples} and eval.every_epochs {config.eval.every_epochs}; set "
            "both above 0 or use eval.checkpoint=last"
        )


def _validate_schedule(config: ConfigDict) -> None:
    options = config.optimizer
    if not all(isinstance(x, (int, float)) and x >= 0 for x in options.drop_before_end):
        raise UserError(
            f"optimizer.drop_before_end is {options.drop_before_end}; it must hold numbers of "
            "epochs, 0 or more each, such as (5.0, 2.0)"
        )
    if options.warmup_epochs >= config.epochs:
        raise UserError(
            f"optimizer.warmup_epochs is {options.warmup_epochs:g}; it must be less than epochs "
            f"({config.epochs})"
        )
    if options.schedule == "cyclic" and not options.warmup_epochs:
        raise UserError(
            "optimizer.schedule is 'cyclic', whose peak is at optimizer.warmup_epochs; set that "
            "above 0"
        )


def _validate_combinations(config: ConfigDict) -> None:
    mixing = config.mixing
    if mixing.probability and not (mixing.mixup_alpha or mixing.cutmix_alpha):
        raise UserError(
            f"mixing.probability is {mixing.probability:g}, but mixing.mixup_alpha and "
            "mixing.cutmix_alpha are both 0; set one above 0 or the probability to 0"
        )
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f"accumulate_steps {config.accumulate_steps} does not divide batch_size "
            f"{config.batch_size}; choose one that does"
        )


def check_tokens(config: ConfigDict, num_tokens: int) -> None:
    """Refuses a patch that leaves a model too few tokens to learn from."""
    if num_tokens < 16 and not config.model.allow_few_tokens:
        raise UserError(
            f"model.patch_size leaves {num_tokens} tokens of a {config.data.image_size}-pixel "
            "image, and with fewer than 16 a transformer hardly learns; choose a smaller patch, "
            "or set model.allow_few_tokens=True"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted fields in which two JSON configurations differ, as 'field old -> new'."""
    old, new = flatten(old), flatten(new)
    return [
        f"{field} {old.get(field)!r} -> {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]


def flatten(tree: dict[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{dotted field: value} of nested dicts, with the groups left out."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for field, value in flat.items():
        *groups, name = field.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = value
    return tree
