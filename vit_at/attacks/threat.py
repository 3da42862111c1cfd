"""Threat models: which perturbations are allowed, and how an attack moves among them.

A perturbation delta has the shape of its images, [b, H, W, C], and is in pixel units. The geometry
of each norm is in ``norms``; here it meets the image range.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_at.attacks.norms import NORMS, largest_size, resize
from vit_at.config import training_balls
from vit_at.errors import UserError

Array = jax.Array
DEFAULT_EPS = {"linf": 8 / 255}  # an eps means something else in each norm
_LEAVES, _STATIC = ("eps", "step_size"), ("norm", "steps")


@dataclasses.dataclass(frozen=True)
class Threat:
    """What an attack may do, in pixel units.

    A pytree: eps and step_size may be arrays under jit; norm and steps are static.

    norm: 'linf', 'l2' or 'l1', in any case. eps: radius of the ball; None: 8/255 in linf, while
    another norm needs one. step_size: of one attack step; None: eps / 4. steps: their number.
    UserError: the norm is unknown or lacks its eps, or eps or step_size is not numeric.
    """

    norm: str = "linf"
    eps: float | Array = None  # type: ignore[assignment]  # never None afterwards
    step_size: float | Array = None  # type: ignore[assignment]
    steps: int = 10

    def __post_init__(self):
        norm = str(self.norm).lower()
        if norm not in NORMS:
            raise UserError(
                f"norm is '{self.norm}', which is unknown; use one of {', '.join(NORMS)}"
            )
        eps = DEFAULT_EPS.get(norm) if self.eps is None else self.eps
        if eps is None:
            raise UserError(
                f"norm is '{norm}' and eps is not given; give one, as the default of 8/255 is for "
                "linf"
            )
        _check_numeric("eps", eps)
        step_size = eps / 4 if self.step_size is None else self.step_size
        _check_numeric("step_size", step_size)
        for name, value in {"norm": norm, "eps": eps, "step_size": step_size}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, options: ConfigDict) -> "Threat":
        """The training threat of ``config.threat``."""
        return cls(options.norm, options.eps, options.step_size, options.steps)

    @classmethod
    def all_of(cls, options: ConfigDict) -> "list[Threat]":
        """The training threat, then those of ``config.threat.also``."""
        return [cls.of(ball) for ball in training_balls(options)]

    def scaled(self, factor: float | Array) -> "Threat":
        """The same threat with eps and step size multiplied by ``factor``."""
        return dataclasses.replace(self, eps=self.eps * factor, step_size=self.step_size * factor)


def _flatten(threat: Threat) -> tuple[Any, tuple[str, int]]:
    leaves = [(jax.tree_util.GetAttrKey(name), getattr(threat, name)) for name in _LEAVES]
    return leaves, (threat.norm, threat.steps)


def _unflatten(static: tuple[str, int], leaves: Any) -> Threat:
    """Without ``__post_init__``: JAX puts None and other markers in the place of numbers."""
    threat = object.__new__(Threat)
    for name, value in zip(_STATIC + _LEAVES, (*static, *leaves), strict=True):
        object.__setattr__(threat, name, value)
    return threat


jax.tree_util.register_pytree_with_keys(Threat, _flatten, _unflatten)


def _check_numeric(name: str, value: Any) -> None:
    number = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    dtype = getattr(value, "dtype", type(value))
    if not number or not jnp.issubdtype(dtype, jnp.number):
        shown = f"the text '{value}'" if isinstance(value, str) else repr(value)
        raise UserError(f"{name} is {shown}; give a number, such as 8 / 255")


def into_ball(delta: Array, threat: Threat) -> Array:
    """The nearest perturbation in the ball; one that is there, up to rounding, is not changed."""
    norm, count = NORMS[threat.norm], delta[0].size
    inside = norm.size(delta) <= largest_size(threat.eps, count, threat.norm)
    return jnp.where(inside, delta, norm.project(delta, threat.eps))


def into_image_range(delta: Array, images: Array) -> Array:
    """The nearest perturbation for which images + delta lies in [0, 1]."""
    return jnp.clip(delta, -images, 1 - images)


def random_start(key: Array, shape: tuple[int, ...], threat: Threat) -> Array:
    """A uniform draw from the ball, float32 [b, H, W, C]."""
    return NORMS[threat.norm].random_start(key, shape, threat.eps)


def ascend(delta: Array, gradient: Array, images: Array, threat: Threat) -> Array:
    """One attack step: the steepest step, then the projection onto the ball and the image range."""
    norm = NORMS[threat.norm]
    moved = delta + norm.steepest_step(gradient, threat.step_size, resize)
    return into_image_range(norm.project(moved, threat.eps), images)
