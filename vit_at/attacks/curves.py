"""Robust accuracy over eps and over attack steps: in the audit of AutoAttack and in reports."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from vit_at.attacks.norms import NORMS
from vit_at.attacks.threat import Threat

Outcomes = Callable[[Threat], np.ndarray]  # which images withstand an attack, [N] bool


def at_factors(threat: Threat, factors: Iterable[float], count: int) -> list[Threat]:
    """The threat with eps and step size times each factor, for every eps in the image range.

    count: number of values of an image; a larger eps than their diameter allows nothing new.
    """
    scaled = [threat.scaled(factor) for factor in factors]
    return [t for t in scaled if t.eps <= NORMS[threat.norm].diameter(count)]


def at_steps(threat: Threat, steps: Iterable[int]) -> list[Threat]:
    """The threat with other numbers of attack steps."""
    return [dataclasses.replace(threat, steps=number) for number in steps]


def over_eps(clean: np.ndarray, outcomes: Outcomes, threats: list[Threat]) -> dict[float, float]:
    """{eps: accuracy}; 0 is the accuracy on clean images, of which ``clean`` [N] are correct."""
    robust = {float(threat.eps): float(outcomes(threat).mean()) for threat in threats}
    return {0.0: float(clean.mean())} | robust


def over_steps(outcomes: Outcomes, threats: list[Threat]) -> dict[int, float]:
    """{attack steps: accuracy}."""
    return {threat.steps: float(outcomes(threat).mean()) for threat in threats}
