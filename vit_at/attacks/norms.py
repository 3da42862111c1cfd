"""The geometry of each norm, written once for all attacks.

A norm is one row of ``NORMS``: the operations of ``Norm``. Arrays are perturbations, gradients or
images [b, ...] in pixel units, and every operation acts on each example alone.

There are two roundings. PGD and FAB divide by max(size, 1e-12), and PGD projects perturbations:
``resize`` and ``Norm.project``. APGD and Square divide by size + 1e-12 and project images:
``resize_as_official`` and ``Norm.project_image``. The results differ in the last bits only. Each
attack keeps the rounding of its reference code, so that recorded runs can be compared closely.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Resize = Callable[[Array, Array, float | Array], Array]
_FLOOR = 1e-12  # prevents 0 / 0: a zero gradient gives a zero step
_L1_SHARE = 0.05  # of the values that a step of PGD moves
_L1_BISECTIONS = 30
_PIXEL_ROUNDING = 1.2e-7  # what float32 may add to the difference of two pixels in [0, 1]


def resize(x: Array, size: Array, length: float | Array) -> Array:
    """x, which has ``size``, scaled to ``length``; 0 stays 0. For PGD and FAB."""
    return length * x / jnp.maximum(size, _FLOOR)


def resize_as_official(x: Array, size: Array, length: float | Array) -> Array:
    """``resize`` with the rounding of the official AutoAttack. For APGD and Square."""
    return length * (x / (size + _FLOOR))


class Norm(NamedTuple):
    """One norm.

    size: (x, numpy or jax.numpy) -> the norm of x, [b, 1, ...].
    dual_size: x -> the dual norm, [b, 1, ...].
    diameter: number of values of an image -> norm of the largest perturbation in [0, 1].
    steepest_step: (gradient, step_size, resize) -> the perturbation of size ``step_size`` in whose
      direction the loss grows fastest. In l1 that is a step of one value, which soon is at its
      bound, so the 5 % of the values with the largest gradient move (Tramer and Boneh 2019).
    project: (delta, eps) -> the nearest perturbation in the ball of radius eps.
    project_image: (point, images, eps) -> the nearest point in the ball around the images; in l1,
      in the part of the ball that lies in [0, 1].
    random_start: (key, shape [b, ...], eps) -> a uniform draw from the ball.
    random_direction: (key, shape) -> a random direction, of any size.
    """

    size: Callable[..., Array]
    dual_size: Callable[[Array], Array]
    diameter: Callable[[int], float]
    steepest_step: Callable[[Array, float | Array, Resize], Array]
    project: Callable[[Array, float | Array], Array]
    project_image: Callable[[Array, Array, float | Array], Array]
    random_start: Callable[[Array, tuple[int, ...], float | Array], Array]
    random_direction: Callable[[Array, tuple[int, ...]], Array]


def _axes(x: Array) -> dict:
    return {"axis": tuple(range(1, x.ndim)), "keepdims": True}


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0)


def _l2_size(x: Array, xp: ModuleType = jnp) -> Array:
    return xp.sqrt(xp.sum(x**2, **_axes(x)))


def _l2_project(delta: Array, eps: float | Array) -> Array:
    return delta * jnp.minimum(1.0, eps / jnp.maximum(_l2_size(delta), _FLOOR))


def _l2_project_image(point: Array, images: Array, eps: float | Array) -> Array:
    delta = point - images
    size = _l2_size(delta)
    return images + resize_as_official(delta, size, jnp.minimum(eps, size))


def _l2_start(key: Array, shape: tuple[int, ...], eps: float | Array) -> Array:
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, shape)
    volume = jax.random.uniform(radius_key, (shape[0],) + (1,) * (len(shape) - 1))
    radius = eps * volume ** (1 / (direction.size // shape[0]))
    return resize(direction, _l2_size(direction), radius)


def _l1_size(x: Array, xp: ModuleType = jnp) -> Array:
    return xp.sum(xp.abs(x), **_axes(x))


def sparse_sign(gradient: Array, share: float | Array) -> Array:
    """The signs of the values with the largest gradients, 0 elsewhere; share [b]: of the values.

    As in the official APGD-L1, all values of the size of the smallest one count.
    """
    b, count = len(gradient), gradient[0].size
    first = jnp.clip((1 - jnp.broadcast_to(share, b)) * count, 0, count - 1).astype(jnp.int32)
    ordered = jnp.sort(jnp.abs(gradient).reshape(b, -1), -1)
    least = jnp.take_along_axis(ordered, first[:, None], -1)
    least = least.reshape(-1, *[1] * (gradient.ndim - 1))
    return jnp.where(jnp.abs(gradient) >= least, jnp.sign(gradient), 0)


def _l1_step(gradient: Array, step_size: float | Array, to: Resize) -> Array:
    signs = sparse_sign(gradient, _L1_SHARE)
    return to(signs, _l1_size(signs), step_size)


def _l1_shrink(size: Array, room: Array, eps: float | Array) -> Array:
    """What each value of a perturbation loses in the projection onto the l1 ball and a box.

    size: of the values; room: their largest size in the box; both [b, ...]. Each value loses the
    same level, at least what is outside of the box and at most all. The level follows from the
    values that lose just that; bisection finds which these are.
    """
    kept = jnp.minimum(size, room)

    def left(level):
        return jnp.sum(jnp.clip(size - level, 0, room), **_axes(size))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        over = left(middle) > eps
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    high = jnp.max(size, **_axes(size))
    low, high = jax.lax.fori_loop(0, _L1_BISECTIONS, halve, (jnp.zeros_like(high), high))
    middle = (low + high) / 2
    free = (size > middle) & (size - room < middle)
    fixed = jnp.sum(jnp.where(size - room >= middle, room, 0), **_axes(size))
    total = jnp.sum(jnp.where(free, size, 0), **_axes(size))
    number = jnp.sum(free, **_axes(size))
    exact = jnp.clip((total + fixed - eps) / jnp.maximum(number, 1), low, high)
    level = jnp.where(jnp.sum(kept, **_axes(size)) > eps, exact, 0)
    return jnp.minimum(jnp.maximum(size - room, level), size)


def _l1_project(delta: Array, eps: float | Array) -> Array:
    size = jnp.abs(delta)
    nearest = jnp.sign(delta) * (size - _l1_shrink(size, jnp.full_like(size, jnp.inf), eps))
    # The difference of large values is rounded; the size must still be at most eps.
    return nearest * jnp.minimum(1.0, eps / jnp.maximum(_l1_size(nearest), _FLOOR))


def l1_shift(delta: Array, images: Array, eps: float | Array) -> Array:
    """What the projection of images + delta onto the l1 ball and [0, 1] adds, [b, ...]."""
    room = jnp.where(delta > 0, 1 - images, images)
    return -jnp.sign(delta) * _l1_shrink(jnp.abs(delta), room, eps)


def _l1_project_image(point: Array, images: Array, eps: float | Array) -> Array:
    delta = point - images
    return images + delta + l1_shift(delta, images, eps)


def _l1_start(key: Array, shape: tuple[int, ...], eps: float | Array) -> Array:
    direction_key, rest_key = jax.random.split(key)
    direction = jax.random.laplace(direction_key, shape)
    rest = jax.random.exponential(rest_key, (shape[0],) + (1,) * (len(shape) - 1))
    return eps * direction / (_l1_size(direction) + rest)


NORMS = {
    "linf": Norm(
        size=lambda x, xp=jnp: xp.max(xp.abs(x), **_axes(x)),
        dual_size=lambda x: jnp.sum(jnp.abs(x), **_axes(x)),
        diameter=lambda count: 1.0,
        steepest_step=lambda gradient, step_size, to: step_size * jnp.sign(gradient),
        project=lambda delta, eps: jnp.clip(delta, -eps, eps),
        project_image=lambda point, images, eps: jnp.clip(point, images - eps, images + eps),
        random_start=lambda key, shape, eps: _uniform(key, shape) * eps,
        random_direction=_uniform,
    ),
    "l2": Norm(
        size=_l2_size,
        dual_size=_l2_size,
        diameter=math.sqrt,
        steepest_step=lambda gradient, step_size, to: to(gradient, _l2_size(gradient), step_size),
        project=_l2_project,
        project_image=_l2_project_image,
        random_start=_l2_start,
        random_direction=jax.random.normal,
    ),
    "l1": Norm(
        size=_l1_size,
        dual_size=lambda x: jnp.max(jnp.abs(x), **_axes(x)),
        diameter=float,
        steepest_step=_l1_step,
        project=_l1_project,
        project_image=_l1_project_image,
        random_start=_l1_start,
        random_direction=jax.random.normal,
    ),
}


def random_directions(keys: Array, shape: tuple[int, ...], norm: str) -> Array:
    """A random direction for each of the keys [b]: [b, *shape], of any size."""
    return jax.vmap(lambda key: NORMS[norm].random_direction(key, shape))(keys)


def sizes(delta: np.ndarray, norm: str) -> np.ndarray:
    """The norm of each of [n, ...], [n], computed on the host in float64."""
    flat = delta.reshape(len(delta), -1).astype(np.float64)
    return np.asarray(NORMS[norm].size(flat, np))[:, 0]


def largest_size(eps: float | Array, count: int, norm: str) -> float | Array:
    """The norm that a perturbation of ``count`` values in the ball may have after rounding."""
    return eps * (1 + 1e-6) + _PIXEL_ROUNDING * NORMS[norm].diameter(count)
