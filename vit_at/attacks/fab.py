"""FAB: the nearest point of another class (Croce and Hein 2020, "Minimally distorted adversarial
examples with a fast adaptive boundary attack", Algorithm 1).

Each iteration linearises the classifier at the iterate, projects the iterate and the clean image
onto the boundary of that linearisation within [0, 1], goes a little beyond a mean of the two, and
where that is adversarial steps back towards the clean image.

FAB-T linearises towards one target class; FAB towards the nearest of all classes.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vit_at.attacks.apgd import length, where
from vit_at.attacks.losses import pick

Array = jax.Array
Linearise = Callable[[Array], tuple[Array, Array]]
_BIAS_MAX = 0.1  # alpha_max: at most this share of the projected clean image
_OVERSHOOT = 1.05  # eta
_BACKWARD = 0.9  # beta
_LENGTH_FLOOR = 1e-8
_WEIGHT_FLOOR = 1e-8  # smaller components of a gradient do not move in L2
_FAR = 1e10


@dataclasses.dataclass(frozen=True)
class Options:
    """norm: linf or l2; iterations: of one run."""

    norm: str = "linf"
    iterations: int = 100


class State(NamedTuple):
    """point [b, H, W, C]: the iterate; adversarial, distance [b]: the nearest adversarial point so
    far and its norm (1e10: none); iteration [b]; is_adversarial [b]: the last forward step was.
    """

    point: Array
    adversarial: Array
    distance: Array
    iteration: Array
    is_adversarial: Array


def start(images: Array, point: Array) -> State:
    """A run that begins at ``point``: the images themselves, or ``random_point`` in a restart."""
    b = images.shape[0]
    return State(
        point=point,
        adversarial=images,
        distance=jnp.full(b, _FAR, images.dtype),
        iteration=jnp.zeros(b, jnp.int32),
        is_adversarial=jnp.zeros(b, bool),
    )


def random_point(images: Array, direction: Array, norm: str, eps: float | Array) -> Array:
    """The start of a restart: half eps from the image, in a direction as in APGD."""
    delta = direction / jnp.maximum(length(direction, norm), 1e-12)
    return jnp.clip(images + 0.5 * eps * delta, 0, 1)


def advance(
    linearise: Linearise,
    correct_at: Callable[[Array], Array],
    images: Array,
    state: State,
    options: Options,
) -> State:
    """One iteration of Algorithm 1.

    linearise: points -> (difference of logits [b], its gradient [b, H, W, C]): the boundary is
      where the difference is 0.
    correct_at: points -> [b] bool.
    """
    norm = options.norm
    difference, normal = linearise(state.point)
    offset = -difference + _dot(normal, state.point)
    from_point = _towards_boundary(state.point, normal, offset, norm)
    from_image = _towards_boundary(images, normal, offset, norm)
    point_length = jnp.maximum(length(from_point, norm), _LENGTH_FLOOR)
    image_length = jnp.maximum(length(from_image, norm), _LENGTH_FLOOR)
    bias = jnp.minimum(point_length / (point_length + image_length), _BIAS_MAX)
    ahead = state.point + _OVERSHOOT * from_point
    near = images + _OVERSHOOT * from_image
    point = jnp.clip(ahead * (1 - bias) + near * bias, 0, 1)

    is_adversarial = ~correct_at(point)
    distance = length(point - images, norm)[:, 0, 0, 0]
    nearer = is_adversarial & (distance < state.distance)
    back = images + (point - images) * _BACKWARD
    return State(
        point=where(is_adversarial, back, point),
        adversarial=where(nearer, point, state.adversarial),
        distance=jnp.where(nearer, distance, state.distance),
        iteration=state.iteration + 1,
        is_adversarial=is_adversarial,
    )


def towards_target(
    logits_fn: Callable[[Array], Array], points: Array, labels: Array, targets: Array
) -> tuple[Array, Array]:
    """The linearisation of z_target - z_label: value [b] and gradient [b, H, W, C]."""

    def total(x):
        logits = logits_fn(x)
        difference = pick(logits, targets) - pick(logits, labels)
        return difference.sum(), difference

    gradient, difference = jax.grad(total, has_aux=True)(points)
    return difference, gradient


def towards_nearest(
    logits_fn: Callable[[Array], Array], points: Array, labels: Array, norm: str
) -> tuple[Array, Array]:
    """The linearisation of z_k - z_label for the class k whose boundary is nearest in it.

    One backward pass for each class; the memory of one.
    """
    logits, pull_back = jax.vjp(logits_fn, points)
    b, num_classes = logits.shape
    chosen = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)

    def nearest(best, k):
        best_distance, _, best_gradient = best
        cotangent = jax.nn.one_hot(jnp.full(b, k), num_classes, dtype=logits.dtype) - chosen
        (gradient,) = pull_back(cotangent)
        difference = logits[:, k] - pick(logits, labels)
        distance = jnp.abs(difference) / (1e-12 + _dual_length(gradient, norm))
        nearer = (distance < best_distance) & (labels != k)
        return (
            jnp.where(nearer, distance, best_distance),
            jnp.where(nearer, difference, best[1]),
            where(nearer, gradient, best_gradient),
        ), None

    far = jnp.full(b, jnp.inf, logits.dtype)
    nothing = (far, jnp.zeros_like(far), jnp.zeros_like(points))
    (_, difference, gradient), _ = lax.scan(nearest, nothing, jnp.arange(num_classes))
    return difference, gradient


def _dual_length(x: Array, norm: str) -> Array:
    """The dual norm [b]: l1 for linf, l2 for l2."""
    return jnp.abs(x).sum((1, 2, 3)) if norm == "linf" else length(x, "l2")[:, 0, 0, 0]


def _towards_boundary(points: Array, normal: Array, offset: Array, norm: str) -> Array:
    """``project`` on whole images."""
    b = points.shape[0]
    step = project(points.reshape(b, -1), normal.reshape(b, -1), offset, norm)
    return step.reshape(points.shape)


def project(points: Array, normal: Array, offset: Array, norm: str) -> Array:
    """The shortest step from points onto the hyperplane <normal, z> = offset within [0, 1].

    points, normal: [b, n]; offset: [b]. Where the hyperplane misses the box, the step goes as near
    as the box lets it. Section 3.1 and appendix A of the paper.

    Along the shortest step every component moves as far as a common level lets it, or to its bound:
    by min(level, room) in linf, by |normal| min(level, room / |normal|) in l2. The level is where
    the sum over the components reaches the distance: ``_water_level``.
    """
    excess = jnp.sum(normal * points, -1) - offset
    normal = jnp.where(excess[:, None] >= 0, normal, -normal)
    room = jnp.where(normal > 0, points, 1 - points)  # before the bound, walking down the normal
    size = jnp.abs(normal)
    if norm == "linf":
        level = _water_level(size, room, jnp.abs(excess))
        return -jnp.sign(normal) * jnp.minimum(level[:, None], room)
    moves = size > _WEIGHT_FLOOR
    weights = jnp.where(moves, normal**2, 0)
    room = jnp.where(moves, room / jnp.where(moves, size, 1), 0)
    level = _water_level(weights, room, jnp.abs(excess))
    return jnp.where(moves, -normal * jnp.minimum(level[:, None], room), 0)


def _water_level(weights: Array, room: Array, total: Array) -> Array:
    """The level [b] at which sum_i weights_i min(level, room_i) is ``total``; infinite if none.

    The sum is concave and piecewise linear in the level, so Newton's method from 0 climbs to the
    solution and stops exactly there, after a few rounds: no sort is needed.
    """

    def unsettled(carry):
        level, last, count = carry
        return jnp.any(level > last) & (count < weights.shape[-1])

    def climb(carry):
        level, _, count = carry
        full = room <= level[:, None]
        filled = jnp.sum(jnp.where(full, weights * room, 0), -1)
        slope = jnp.sum(jnp.where(full, 0, weights), -1)
        risen = (total - filled) / jnp.where(slope > 0, slope, 1)
        risen = jnp.where(slope > 0, risen, jnp.inf)
        return jnp.maximum(risen, level), level, count + 1

    start = jnp.zeros_like(total)
    level, _, _ = lax.while_loop(unsettled, climb, (start, start - 1, 0))
    return level


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=(1, 2, 3))
