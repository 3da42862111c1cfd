"""Threat models: which perturbations are allowed, and how an attack moves among them.

A perturbation delta has the shape of its images, [b, H, W, C], and is in pixel units. The geometry
of each norm is in ``norms``; here it meets the image range.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_at.attacks.norms import NORMS, resize

Array = jax.Array


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
