"""The schema of a configuration.

``validate`` refuses unknown, out-of-range and contradictory values before any file is written, in
one sentence with the field, its value, the allowed values and the remedy.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vit_at.errors import UserError, nearest

CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "model.stem": ("patch", "conv"),
    "sharding": ("replicated", "fsdp"),
    "threat.method": ("pgd", "apgd"),
    "threat.combine": ("max", "avg"),
    "threat.norm": ("linf", "l2", "l1"),
    "eval.threat.norm": ("", "linf", "l2", "l1"),
    "threat.start": ("random", "zero", "noise"),
    "optimizer.name": ("sgd", "adamw", "muon"),
    "optimizer.schedule": ("step", "cosine", "cyclic", "constant"),
    "eval.checkpoint": ("best", "last"),
    "eval.weights": ("", "raw", "ema", "swa"),
    "eval.precision": ("float32", "bf16x9", "bf16x6", "tf32x3"),  # NVIDIA GPUs have the others
}

# What is stored of a run: the best weights on validation, and the last of each kind.
CHECKPOINTS = ("best", "last", "last-raw", "last-ema", "last-swa")
MAX_STEPS = 2**31 - 1  # the step is an int32 on the device
# {field: (lowest, highest)} of whole numbers. No real run reaches the highest values; they catch
# slips of the keyboard before memory, disk or hours are spent.
_WHOLE = {
    "seed": (0, 2**32 - 1),  # what JAX and NumPy take
    "epochs": (1, 10**6),
    "batch_size": (1, 2**20),
    "accumulate_steps": (1, 2**20),
    "log_every_steps": (1, 10**9),
    "model.patch_size": (0, 8192),
    "model.embed_dim": (0, 2**16),
    "model.depth": (0, 1000),
    "model.num_heads": (0, 1024),
    "data.validation_examples": (0, 10**9),
    "data.image_size": (1, 8192),
    "data.crop_padding": (0, 8192),
    "data.threads": (0, 1024),
    "threat.steps": (1, 10**4),
    "masking.patch_size": (0, 8192),
    "eval.every_epochs": (0, 10**6),
    "eval.num_examples": (0, 10**9),
    "eval.batch_size": (1, 2**20),
    "checkpoint.every_steps": (0, 10**9),
    "checkpoint.keep": (1, 10**4),
}
# {highest: fields} of numbers from 0.
_NUMBERS = {
    1: "mixing.probability mixing.cutmix_probability masking.keep_max optimizer.drop_factor "
    "awp.gamma optimizer.layer_decay data.extra.fraction",
    100: "model.mlp_ratio",
    1000: "optimizer.learning_rate optimizer.weight_decay",
    10**4: "model.qk_scale mixing.mixup_alpha mixing.cutmix_alpha",
    10**6: "beta data.cache_gib threat.eps_warmup_epochs awp.warmup_epochs swa_epochs "
    "masking.warmup_epochs optimizer.warmup_epochs checkpoint.every_minutes",
    10**9: "optimizer.clip_norm eval.threat.eps eval.threat.step_size",
}
_SHARES = "label_smoothing ema_decay model.drop_path optimizer.momentum optimizer.b1 optimizer.b2"
_ANY_NUMBER = "threat.eps threat.step_size"
_SWITCHES = (
    "model.remat model.allow_few_tokens data.allow_overlap data.stratified data.flip masking.ard "
    "masking.prm eval.stop_if_overfitted model.fused_attention"
)
_TEXTS = (
    "name dtype sharding objective phases model.name model.stem model.pretrained data.name "
    "data.dir data.decoded_dir data.train_split data.test_split data.from_images data.transform "
    "data.augment data.extra.name data.extra.split threat.method threat.norm threat.start "
    "threat.also threat.combine optimizer.name optimizer.schedule eval.validation_attack "
    "eval.attacks eval.checkpoint eval.weights eval.precision eval.threat.norm"
)
_TUPLES = "data.mean data.std optimizer.drop_before_end"
_NAME_BYTES = 200  # a file system allows 255, and files beside the directory add a suffix
_TEXT_LENGTH = 4096  # the longest path of Linux

# Fields that older ``config.json`` files lack, with the value that describes those runs.
ADDED = {"sharding": "replicated", "model.remat": False, "checkpoint.every_steps": 0}
ADDED |= {"model.fused_attention": True}  # on GPUs
ADDED |= {"data.allow_overlap": False, "data.stratified": False, "model.stem": "patch"}
ADDED |= {"data.transform": "squash", "data.augment": "", "data.from_images": ""}
ADDED |= {"awp.gamma": 0.0, "awp.warmup_epochs": 0.0, "optimizer.layer_decay": 1.0}
ADDED |= {"eval.stop_if_overfitted": False, "eval.weights": "", "swa_epochs": 0.0}
ADDED |= {"eval.precision": "float32", "threat.method": "pgd", "phases": ""}
ADDED |= {"threat.also": "", "threat.combine": "max", "data.decoded_dir": ""}
ADDED |= {"data.extra.name": "", "data.extra.split": "train", "data.extra.fraction": 0.0}
ADDED |= {"eval.threat.norm": "", "eval.threat.eps": 0.0, "eval.threat.step_size": 0.0}


def with_added(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the fields of ADDED that it lacks."""
    flat = flatten(stored)
    return nested(flat | {field: v for field, v in ADDED.items() if field not in flat})


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first field whose value is not allowed.

    ``training.objectives.check`` also checks the objective, and what depends on it.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the configuration is {_shown(config)}; give a ConfigDict, such as "
            "vit_at.configs.load('digits_sgd')"
        )
    flat = flatten(config)
    _validate_types(flat)
    _validate_name(config.name)
    for field, choices in CHOICES.items():
        value = flat[field]
        if value not in choices:
            raise UserError(
                f"{field} is '{value}', which is unknown; allowed are {', '.join(choices)} "
                f"(nearest: {nearest(str(value), choices, 1)})"
            )
    _validate_ranges(flat)
    _validate_threat(config)
    _validate_data(config)
    _validate_schedule(config)
    _validate_combinations(config)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _TEXT_LENGTH


# (fields, whether a value is of their type, the type in words)
_TYPES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (" ".join(_WHOLE), lambda v: type(v) is int, "a whole number"),
    (" ".join([*_NUMBERS.values(), _SHARES, _ANY_NUMBER]), _number, "a number"),
    (_SWITCHES, lambda v: isinstance(v, bool), "True or False"),
    (_TEXTS, _text, f"text of at most {_TEXT_LENGTH} printable characters"),
    (
        _TUPLES,
        lambda v: isinstance(v, (tuple, list)) and len(v) <= 1000 and all(map(_number, v)),
        "a tuple of numbers, such as (0.5,) or (0.5, 0.5, 0.5)",
    ),
)


def _shown(value: Any) -> str:
    """A value for a sentence: in one line, cut if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _validate_types(flat: dict[str, Any]) -> None:
    known = [field for fields, _, _ in _TYPES for field in fields.split()]
    if unknown := [field for field in flat if field not in known]:
        near = nearest(unknown[0], known)
        raise UserError(f"config field '{unknown[0]}' is unknown; the nearest are {near}")
    for fields, fits, kind in _TYPES:
        for field in fields.split():
            if field not in flat:
                raise UserError(
                    f"{field} is missing; start from vit_at.configs.default.get_config(), which "
                    "has every field"
                )
            if not fits(flat[field]):
                raise UserError(f"{field} is {_shown(flat[field])}; it must be {kind}")


def _validate_name(name: str) -> None:
    if not name.strip():
        raise UserError("name is empty, but names the run and its directory; give it a word")
    if "/" in name or name in (".", "..") or len(name.encode()) > _NAME_BYTES:
        raise UserError(
            f"name is {_shown(name)}, but names a directory; it must be a word without '/' of at "
            f"most {_NAME_BYTES} bytes; --workdir says where the run is stored"
        )


def _validate_ranges(flat: dict[str, Any]) -> None:
    for field, (low, high) in _WHOLE.items():
        if not low <= flat[field] <= high:
            allowed = f"a whole number, {low} or more and at most {high}"
            raise UserError(f"{field} is {_shown(flat[field])}; it must be {allowed}")
    for high, fields in _NUMBERS.items():
        for field in fields.split():
            if not 0 <= flat[field] <= high:
                allowed = "from 0 to 1" if high == 1 else f"0 or more and at most {high}"
                raise UserError(f"{field} is {_shown(flat[field])}; it must be {allowed}")
    for field in _SHARES.split():
        if not 0 <= flat[field] < 1:
            raise UserError(
                f"{field} is {_shown(flat[field])}; it must be from 0 up to but not including 1"
            )


def _validate_threat(config: ConfigDict) -> None:
    training, *further = training_balls(config.threat)
    balls = {"threat": training, "eval.threat": evaluation_threat(config)}
    for name, ball in (balls | {f"threat.also[{b.norm}]": b for b in further}).items():
        _validate_ball(name, ball, len(config.data.mean) * config.data.image_size**2)


def fraction(text: str) -> float:
    """'8/255' or '0.03', as perturbation sizes are written, as a number; ValueError: neither."""
    top, _, bottom = text.partition("/")
    if bottom and not float(bottom):
        raise ValueError(f"'{text}' divides by 0")
    return float(top) / float(bottom or 1)


def training_balls(threat: ConfigDict) -> list[ConfigDict]:
    """``threat``, then a copy of it for each NORM:EPS:STEP_SIZE of ``threat.also``, in any case.

    UserError: one can't be read, or its norm is unknown or named before.
    """
    norms, found = CHOICES["threat.norm"], {threat.norm: threat}
    for text in filter(None, map(str.strip, threat.also.lower().split(","))):
        norm, *numbers = text.split(":")
        try:
            eps, step_size = map(fraction, numbers)
        except ValueError:
            raise UserError(
                f"threat.also has '{text}'; write NORM:EPS:STEP_SIZE, such as 'l2:0.5:0.125'"
            ) from None
        if norm in found or norm not in norms:
            raise UserError(
                f"threat.also has '{text}', whose norm is named before or unknown; name each of "
                f"{', '.join(norms)} at most once"
            )
        found[norm] = ConfigDict({**threat, "norm": norm, "eps": eps, "step_size": step_size})
    return list(found.values())


def evaluation_threat(config: ConfigDict) -> ConfigDict:
    """The threat of validation and evaluation: ``threat``, with what ``eval.threat`` changes.

    Without a step size there, steps are those of training, but at most a quarter of eps, as in
    published evaluations: FGSM and PGD-2 train with longer ones.

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
    if not own.step_size:
        threat.step_size = min(threat.step_size, threat.eps / 4)
    return threat


def evaluated_weights(config: ConfigDict) -> str:
    """Which weights are validated and tested, ``eval.weights``: raw, ema or swa."""
    if config.eval.weights:
        return config.eval.weights
    return "swa" if config.swa_epochs else "ema" if config.ema_decay else "raw"


def _validate_ball(name: str, threat: ConfigDict, values: int) -> None:
    """values: of an image."""
    largest, what, example = {
        "linf": (1, "eps is in pixel units of", "8/255"),
        "l2": (100, "an L2 eps is a length in pixel units of", "0.5"),
        "l1": (values, "an L1 eps is a sum over the values of", "12"),
    }[threat.norm]
    if not 0 < threat.eps <= largest:
        slip = threat.norm == "linf" and threat.eps > 1
        meant = f"did you mean {threat.eps:g}/255?" if slip else f"write such as {example}"
        raise UserError(
            f"{name}.eps is {threat.eps:g}; {what} images in [0, 1], so it must be over 0 and at "
            f"most {largest}: {meant}"
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
    for field, low, allowed in (("mean", 0, "from 0 to 1"), ("std", 1e-3, "from 0.001 to 1")):
        if not all(low <= value <= 1 for value in data[field]):
            raise UserError(
                f"data.{field} is {data[field]}; it is in pixel units of images in [0, 1], so "
                f"every channel must be {allowed}: divide values of 0 to 255 by 255"
            )
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
    if not all(0 <= epochs <= 10**6 for epochs in options.drop_before_end):
        raise UserError(
            f"optimizer.drop_before_end is {_shown(options.drop_before_end)}; it must hold numbers "
            "of epochs, 0 or more and at most 1000000 each, such as (5.0, 2.0)"
        )
    if options.warmup_epochs >= config.epochs:
        raise UserError(
            f"optimizer.warmup_epochs is {options.warmup_epochs:g}; it must be less than epochs "
            f"({config.epochs})"
        )
    others = config.model.name.startswith(("swin", "xcit", "convnext"))
    if not options.layer_decay or (options.layer_decay < 1 and others):
        raise UserError(
            f"optimizer.layer_decay is {options.layer_decay:g} with model.name "
            f"'{config.model.name}'; it must be over 0 and at most 1, such as 0.75, and 1 for "
            "Swin, XCiT and ConvNeXt"
        )
    if config.swa_epochs > config.epochs:
        raise UserError(
            f"swa_epochs is {config.swa_epochs:g}; it must be at most epochs ({config.epochs})"
        )
    if options.schedule == "cyclic" and not options.warmup_epochs:
        raise UserError(
            "optimizer.schedule is 'cyclic', whose peak is at optimizer.warmup_epochs; set that "
            "above 0"
        )


def _validate_combinations(config: ConfigDict) -> None:
    averaged = {"ema": ("ema_decay", config.ema_decay), "swa": ("swa_epochs", config.swa_epochs)}
    field, value = averaged.get(config.eval.weights, ("", 1))
    if not value:
        raise UserError(
            f"eval.weights is '{config.eval.weights}', but {field} is 0, so there are none; set it "
            "above 0, or eval.weights to '' or raw"
        )
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
