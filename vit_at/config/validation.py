"""``validate`` refuses unknown, out-of-range and contradictory values before any file is written.

In one sentence with the field, its value, the allowed values and the remedy.
"""

from typing import Any

from ml_collections import ConfigDict

from vit_at.config.derived import evaluation_threat, training_balls
from vit_at.config.fields import CHOICES, NAME_BYTES, NUMBERS, SHARES, TYPES, WHOLE
from vit_at.config.trees import flatten
from vit_at.errors import UserError, nearest


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


def _shown(value: Any) -> str:
    """A value for a sentence: in one line, cut if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _validate_types(flat: dict[str, Any]) -> None:
    known = [field for fields, _, _ in TYPES for field in fields.split()]
    if unknown := [field for field in flat if field not in known]:
        near = nearest(unknown[0], known)
        raise UserError(f"config field '{unknown[0]}' is unknown; the nearest are {near}")
    for fields, fits, kind in TYPES:
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
    if "/" in name or name in (".", "..") or len(name.encode()) > NAME_BYTES:
        raise UserError(
            f"name is {_shown(name)}, but names a directory; it must be a word without '/' of at "
            f"most {NAME_BYTES} bytes; --workdir says where the run is stored"
        )


def _validate_ranges(flat: dict[str, Any]) -> None:
    for field, (low, high) in WHOLE.items():
        if not low <= flat[field] <= high:
            allowed = f"a whole number, {low} or more and at most {high}"
            raise UserError(f"{field} is {_shown(flat[field])}; it must be {allowed}")
    for high, fields in NUMBERS.items():
        for field in fields.split():
            if not 0 <= flat[field] <= high:
                allowed = "from 0 to 1" if high == 1 else f"0 or more and at most {high}"
                raise UserError(f"{field} is {_shown(flat[field])}; it must be {allowed}")
    for field in SHARES.split():
        if not 0 <= flat[field] < 1:
            raise UserError(
                f"{field} is {_shown(flat[field])}; it must be from 0 up to but not including 1"
            )


def _validate_threat(config: ConfigDict) -> None:
    training, *further = training_balls(config.threat)
    balls = {"threat": training, "eval.threat": evaluation_threat(config)}
    for name, ball in (balls | {f"threat.also[{b.norm}]": b for b in further}).items():
        _validate_ball(name, ball, len(config.data.mean) * config.data.image_size**2)


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
    if data.validation_examples and config.eval.every_epochs:
        return
    for needs, field, other in (
        (config.eval.checkpoint == "best", "eval.checkpoint is 'best'", "eval.checkpoint=last"),
        (config.eval.stop_if_overfitted, "eval.stop_if_overfitted is True", "set that to False"),
    ):
        if needs:
            raise UserError(
                f"{field}, which needs validation, but data.validation_examples is "
                f"{data.validation_examples} and eval.every_epochs {config.eval.every_epochs}; set "
                f"both above 0, or {other}"
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
