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
from vit_at.config import training_balls
from vit_at.errors import UserError

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

    norm: 'linf', 'l2' or 'l1', in any case. eps: radius of the ball; step_size: of one attack step;
    steps: their number. UserError: the norm is unknown, or a number is a text.
    """

    norm: str = "linf"
    eps: float | Array = 8 / 255
    step_size: float | Array = 2 / 255
    steps: int = 10

    def __post_init__(self):
        norm, shown = str(self.norm).lower(), {"eps": self.eps, "step_size": self.step_size}
        if norm not in NORMS:
            raise UserError(
                f"norm is '{self.norm}', which is unknown; use one of {', '.join(NORMS)}"
            )
        object.__setattr__(self, "norm", norm)
        for name, value in shown.items():
            if isinstance(value, str):
                raise UserError(f"{name} is the text '{value}'; give a number, such as 8 / 255")

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
