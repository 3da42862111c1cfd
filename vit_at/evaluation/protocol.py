"""Evaluations by name, and the records of their results.

parse_attacks   'clean,pgd-20,autoattack' -> what to run
check_classes   refuses attacks that need more classes
record          an accuracy with the protocol it was measured under: an entry of ``results.json``
union_record    that of the worst case over norms
"""

import dataclasses
import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import vit_at
from vit_at.attacks.autoattack import settings
from vit_at.attacks.threat import Threat
from vit_at.data.examples import Examples
from vit_at.errors import UserError
from vit_at.workdir.results import AUTOATTACK

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_STEPS = re.compile("[1-9][0-9]{0,5}")  # without zeros in front, so one number has one name
_LOSSES = {"pgd": "ce", "cw": "cw"}  # what attacks named NAME-STEPS maximise
# The cascades by name, and each attack alone; without 'rand', which is for random models.
_AUTOATTACKS = {AUTOATTACK: "standard", f"{AUTOATTACK}-plus": "plus"} | {
    n: n for n in settings.NAMES
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """One evaluation.

    kind: 'clean', 'pgd', 'cw' or 'autoattack'.
    restarts: of pgd and cw; version: of autoattack, the ``attacks`` of ``autoattack.run``.
    precision: of matrix products, one of ``precision.PRECISIONS``.
    """

    name: str
    kind: str
    threat: Threat
    restarts: int = 1
    version: str = ""
    precision: str = "float32"

    @property
    def loss(self) -> str:
        """What the attack maximises: 'ce' or 'cw' of pgd and cw, 'autoattack' of autoattack."""
        return _LOSSES.get(self.kind, self.kind)


def parse_attacks(
    names: str, threat: Threat, restarts: int = 1, precision: str = "float32"
) -> list[Attack]:
    """What to run, from names such as 'clean,pgd-20,cw-20'; UserError for another form of name.

    The numbers are attack steps.
    """
    parsed = [_parse_attack(name.strip(), threat, restarts) for name in names.split(",")]
    return [dataclasses.replace(attack, precision=precision) for attack in parsed]


def _parse_attack(name: str, threat: Threat, restarts: int) -> Attack:
    if name == "clean":
        return Attack(name, name, threat)
    if name in _AUTOATTACKS:
        return Attack(name, AUTOATTACK, threat, version=_AUTOATTACKS[name])
    kind, _, steps = name.partition("-")
    if kind not in _LOSSES or not _STEPS.fullmatch(steps):
        raise UserError(
            f"attack '{name}' is unknown; write clean, pgd-N or cw-N with N steps, 1 to 999999, "
            f"such as pgd-20, or {', '.join(_AUTOATTACKS)}"
        )
    return Attack(name, kind, dataclasses.replace(threat, steps=int(steps)), restarts)


def check_classes(attacks: Sequence[Attack], num_classes: int) -> None:
    """UserError for an attack that can't work with so few classes, see ``settings.for_classes``."""
    for attack in attacks:
        if attack.kind == AUTOATTACK:
            settings.for_classes(settings.parse(attack.version), num_classes)


def weights_digest(params: Any) -> str:
    """First 16 hex digits of the SHA-256 over all parameters: identifies the weights."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]


def record(
    attack: Attack, correct: np.ndarray, *, examples: Examples, seed: int, weights: dict[str, Any]
) -> dict[str, Any]:
    """One result with the protocol it was measured under: an entry of ``results.json``."""
    protocol = {
        "data": examples.name,
        "num_examples": len(correct),
        "resolution": examples.image_shape[0],
        "transform": examples.transform,
        "seed": seed,
        "dtype": "float32",
        "weights": weights,
        "packages": {"vit_at": vit_at.__version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    if attack.precision != "float32":
        protocol["precision"] = attack.precision
    optional = {"ids": examples.ids, "contents": examples.contents}
    protocol |= {name: value for name, value in optional.items() if value}
    if attack.kind != "clean":
        threat = attack.threat
        protocol |= {"norm": threat.norm, "eps": float(threat.eps), "loss": attack.loss}
        if attack.kind == AUTOATTACK:
            protocol |= {"version": attack.version}
        else:
            protocol |= {"step_size": float(threat.step_size), "steps": threat.steps}
            protocol |= {"restarts": attack.restarts}
    return {"attack": attack.name, **_counted(correct), "protocol": protocol}


def union_record(records: Sequence[dict[str, Any]], correct: np.ndarray) -> dict[str, Any]:
    """That of the worst case over records of one attack in several norms, 'NAME-union'.

    correct: [N] bool, in all of them.
    """
    fields = ("norm", "eps", "step_size")
    parts = [{n: r["protocol"][n] for n in fields if n in r["protocol"]} for r in records]
    shared = {n: value for n, value in records[0]["protocol"].items() if n not in fields}
    return {"attack": f"{records[0]['attack']}-union", **_counted(correct)} | {
        "protocol": shared | {"union": parts}
    }


def _counted(correct: np.ndarray) -> dict[str, Any]:
    accuracy = float(correct.mean())
    return {
        "accuracy": accuracy,
        "correct": int(correct.sum()),
        "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(correct))),
    }
