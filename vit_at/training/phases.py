"""Fields that change in the course of a run: ``config.phases``.

    --config.phases="0 data.image_size=84 threat.steps=1; 20 data.image_size=224 threat.steps=2"

A phase begins after a number of epochs, sets fields, and keeps what the phases before it have set.
AdvXL (Wang et al. 2024) so grows images and attack, and weak-to-strong augmentation its names. Each
phase is a step of its own, compiled when it begins; parameters, optimiser and data stay the same.
Smaller images are the larger ones resized on the device. Validation and evaluation are of the
configuration itself, so its ``data.image_size`` is the largest.
"""

import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_at import models
from vit_at.config import validate
from vit_at.configs import fields
from vit_at.data import augment
from vit_at.errors import UserError
from vit_at.training import metrics

FIELDS = ("threat.eps", "threat.step_size", "threat.steps", "data.augment", "data.image_size")
_EXAMPLE = "'0 threat.steps=1; 20 threat.steps=2 threat.eps=8/255'"


class Phase(NamedTuple):
    """The configuration of a run from an epoch on, counted from 0."""

    epoch: int
    config: ConfigDict


def of(config: ConfigDict) -> list[Phase]:
    """The phases of a run, the first from epoch 0.

    Raises:
      UserError: a text that can't be read, an epoch out of order, or a field or value that is not
        allowed.
    """
    found, before = [Phase(0, config)], -1
    for text in filter(None, map(str.strip, config.phases.split(";"))):
        epoch, *changes = text.split()
        if not re.fullmatch(r"\d{1,7}", epoch) or not changes:
            raise UserError(
                f"phases has '{text}'; a phase is an epoch and FIELD=VALUE, such as {_EXAMPLE}"
            )
        if not before < int(epoch) < config.epochs:
            raise UserError(
                f"phases has a phase from epoch {epoch}; epochs must increase and be less than "
                f"epochs ({config.epochs})"
            )
        before = int(epoch)
        changed = Phase(before, _changed(found[-1].config, changes))
        found = [*found, changed] if before else [changed]
    return found


def _changed(config: ConfigDict, changes: list[str]) -> ConfigDict:
    for change in changes:
        field, equals, _ = change.partition("=")
        if field not in FIELDS or not equals:
            raise UserError(
                f"phases has '{change}'; it may set {', '.join(FIELDS)}, as FIELD=VALUE"
            )
    config = config.copy_and_resolve_references()
    return fields.override(config, [fields.FLAG + change for change in changes])


def check(config: ConfigDict, model: Any) -> None:
    """Raises UserError where a phase is not allowed, or not for this model."""
    largest = config.data.image_size
    for phase in of(config):
        try:
            validate(phase.config)
            augment.check(phase.config.data)
            of_phase = models.build(phase.config, model.num_classes, model.dtype)
        except UserError as error:
            raise UserError(f"in the phase from epoch {phase.epoch}: {error}") from error
        size = phase.config.data.image_size
        if size > largest or (size < largest and not of_phase.any_size):
            raise UserError(
                f"phases sets data.image_size to {size}, but it must be at most that of the "
                f"configuration, {largest}, which is evaluated, and stay the same for Swin"
            )


def mean_step_flops(config: ConfigDict, model: Any) -> float:
    """Operations of an update, on average over the run."""
    phases, total = of(config), 0.0
    ends = [*(phase.epoch for phase in phases[1:]), config.epochs]
    for (begin, changed), end in zip(phases, ends, strict=True):
        forward = model.clone(image_size=changed.data.image_size).forward_flops()
        total += (end - begin) * metrics.step_flops(changed, forward)
    return total / config.epochs
