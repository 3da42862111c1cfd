"""The fields of a configuration: their types, their limits, and those that came later."""

from collections.abc import Callable
from typing import Any

from vit_at.config.trees import flatten, nested

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
WHOLE = {
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
NUMBERS = {
    1: "mixing.probability mixing.cutmix_probability masking.keep_max optimizer.drop_factor "
    "awp.gamma optimizer.layer_decay data.extra.fraction",
    100: "model.mlp_ratio",
    1000: "optimizer.learning_rate optimizer.weight_decay",
    10**4: "model.qk_scale mixing.mixup_alpha mixing.cutmix_alpha",
    10**6: "beta data.cache_gib threat.eps_warmup_epochs awp.warmup_epochs swa_epochs "
    "masking.warmup_epochs optimizer.warmup_epochs checkpoint.every_minutes",
    10**9: "optimizer.clip_norm eval.threat.eps eval.threat.step_size",
}
SHARES = "label_smoothing ema_decay model.drop_path optimizer.momentum optimizer.b1 optimizer.b2"
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
NAME_BYTES = 200  # a file system allows 255, and files beside the directory add a suffix
_TEXT_LENGTH = 4096  # the longest path of Linux


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _TEXT_LENGTH


# (fields, whether a value is of their type, the type in words)
TYPES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (" ".join(WHOLE), lambda v: type(v) is int, "a whole number"),
    (" ".join([*NUMBERS.values(), SHARES, _ANY_NUMBER]), _number, "a number"),
    (_SWITCHES, lambda v: isinstance(v, bool), "True or False"),
    (_TEXTS, _text, f"text of at most {_TEXT_LENGTH} printable characters"),
    (
        _TUPLES,
        lambda v: isinstance(v, (tuple, list)) and len(v) <= 1000 and all(map(_number, v)),
        "a tuple of numbers, such as (0.5,) or (0.5, 0.5, 0.5)",
    ),
)

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
