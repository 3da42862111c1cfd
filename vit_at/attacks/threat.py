"""Threat models: which perturbations are allowed, and how to move among them.

A perturbation delta has the shape of its images, [b, H, W, C], and is in pixel units. Every norm
comes with three operations, each per example:

random_start     a uniform draw from the ball
steepest_step    the direction of length step_size in which the loss grows fastest
project          the nearest point of the ball

Staying inside the image range is the same for all norms: ``into_image_range``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Array = jax.Array
_NORM_FLOOR = 1e-12  # keeps 0 / 0 away: a zero gradient gives a zero step


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("eps", "step_size"),
    meta_fields=("norm", "steps"),
)
@dataclasses.dataclass(frozen=True)
class Threat:
    """What an attack may do, in pixel units.

    A pytree: eps and step_size may be arrays under jit; norm and steps are static.

    eps: radius of the ball; step_size: of one attack step; steps: their number.
    """

    norm: str = "linf"
    eps: float | Array = 8 / 255
    step_size: float | Array = 2 / 255
    steps: int = 10

    @classmethod
    def of(cls, options: ConfigDict) -> "Threat":
        """The training threat of ``config.threat``."""
        return cls(options.norm, options.eps, options.step_size, options.steps)

    def scaled(self, factor: float | Array) -> "Threat":
        """The same threat with eps and step size multiplied by ``factor``."""
        return dataclasses.replace(self, eps=self.eps * factor, step_size=self.step_size * factor)


class Norm(NamedTuple):
    """The geometry of one norm; see the module's docstring."""

    random_start: Callable[[Array, tuple[int, ...], float | Array], Array]
    steepest_step: Callable[[Array, float | Array], Array]
    project: Callable[[Array, float | Array], Array]


def _l2_norm(x: Array) -> Array:
    """[b, ...] -> [b, 1, ...]."""
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))


def _linf_start(key: Array, shape: tuple[int, ...], eps: float | Array) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0) * eps


def _linf_step(gradient: Array, step_size: float | Array) -> Array:
    return step_size * jnp.sign(gradient)


def _linf_project(delta: Array, eps: float | Array) -> Array:
    return jnp.clip(delta, -eps, eps)


def _l2_start(key: Array, shape: tuple[int, ...], eps: float | Array) -> Array:
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, shape)
    volume = jax.random.uniform(radius_key, (shape[0],) + (1,) * (len(shape) - 1))
    radius = eps * volume ** (1 / (direction.size // shape[0]))
    return radius * direction / jnp.maximum(_l2_norm(direction), _NORM_FLOOR)


def _l2_step(gradient: Array, step_size: float | Array) -> Array:
    return step_size * gradient / jnp.maximum(_l2_norm(gradient), _NORM_FLOOR)


def _l2_project(delta: Array, eps: float | Array) -> Array:
    return delta * jnp.minimum(1.0, eps / jnp.maximum(_l2_norm(delta), _NORM_FLOOR))


NORMS = {
    "linf": Norm(_linf_start, _linf_step, _linf_project),
    "l2": Norm(_l2_start, _l2_step, _l2_project),
}


def into_image_range(delta: Array, images: Array) -> Array:
    """The nearest perturbation for which images + delta lies in [0, 1]."""
    return jnp.clip(delta, -images, 1 - images)


def random_start(key: Array, shape: tuple[int, ...], threat: Threat) -> Array:
    """A uniform draw from the ball, float32 [b, H, W, C]."""
    return NORMS[threat.norm].random_start(key, shape, threat.eps)


def ascend(delta: Array, gradient: Array, images: Array, threat: Threat) -> Array:
    """One attack step: the steepest step, then back into the ball and the image range."""
    norm = NORMS[threat.norm]
    moved = delta + norm.steepest_step(gradient, threat.step_size)
    return into_image_range(norm.project(moved, threat.eps), images)
