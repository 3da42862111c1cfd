"""FAB: the nearest point of another class (Croce and Hein 2020, "Minimally distorted adversarial
examples with a fast adaptive boundary attack", Algorithm 1).

Each iteration linearises the classifier at the iterate, projects the iterate and the clean image
onto the linearised decision boundary within [0, 1], and moves slightly beyond a mean of the two
projections. If that point is adversarial, the iterate moves back towards the clean image.

FAB-T linearises towards one target class, FAB towards the class with the nearest boundary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vit_at.attacks.apgd import where
from vit_at.attacks.losses import finite_or_zero, pick
from vit_at.attacks.norms import NORMS, resize

Array = jax.Array
Linearise = Callable[[Array], tuple[Array, Array]]
_BIAS_MAX = 0.1  # alpha_max: the largest weight of the projected clean image
_OVERSHOOT = 1.05  # eta
_BACKWARD = 0.9  # beta
_SIZE_FLOOR = 1e-8
_WEIGHT_FLOOR = 1e-8  # pixels with a smaller gradient do not move in l2
_FAR = 1e10  # distance where no adversarial point is known


class State(NamedTuple):
    """One batch of runs.

    point: the iterate, adversarial: the nearest adversarial point so far, both [b, H, W, C];
    distance: the norm of its perturbation, [b], 1e10 if there is none; iteration: [b];
    is_adversarial: [b] bool, whether the last forward step was.
    """

    point: Array
    adversarial: Array
    distance: Array
    iteration: Array
    is_adversarial: Array


def start(images: Array, point: Array) -> State:
    """Starts runs at ``point``: the images themselves, or ``random_point`` in a restart."""
    b = images.shape[0]
    return State(
        point=point,
        adversarial=images,
        distance=jnp.full(b, _FAR, images.dtype),
        iteration=jnp.zeros(b, jnp.int32),
        is_adversarial=jnp.zeros(b, bool),
    )


def random_point(images: Array, direction: Array, norm: str, eps: float | Array) -> Array:
    """The start of a restart: half of eps from the images, in a direction [b, H, W, C]."""
    unit = resize(direction, NORMS[norm].size(direction), 1.0)
    return jnp.clip(images + 0.5 * eps * unit, 0, 1)


def advance(
    linearise: Linearise,
    correct_at: Callable[[Array], Array],
    images: Array,
    state: State,
    norm: str,
) -> State:
    """One iteration of Algorithm 1.

    linearise: points -> (difference of logits [b], its gradient [b, H, W, C]); the difference is 0
      on the boundary.
    correct_at: points -> [b] bool.
    """
    size = NORMS[norm].size
    difference, normal = map(finite_or_zero, linearise(state.point))
    offset = -difference + jnp.sum(normal * state.point, axis=(1, 2, 3))
    both = [jnp.concatenate(pair) for pair in ((state.point, images), (normal,) * 2, (offset,) * 2)]
    from_point, from_image = jnp.split(project(*both, norm), 2)  # by one loop, not two
    point_size = jnp.maximum(size(from_point), _SIZE_FLOOR)
    image_size = jnp.maximum(size(from_image), _SIZE_FLOOR)
    bias = jnp.minimum(point_size / (point_size + image_size), _BIAS_MAX)
    ahead = state.point + _OVERSHOOT * from_point
    near = images + _OVERSHOOT * from_image
    point = jnp.clip(ahead * (1 - bias) + near * bias, 0, 1)

    is_adversarial = ~correct_at(point)
    distance = size(point - images)[:, 0, 0, 0]
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
    """The linearisation of z_k - z_label, k being the class with the nearest linearised boundary.

    One backward pass for each class, with the memory of one.
    """
    logits, pull_back = jax.vjp(logits_fn, points)
    b, num_classes = logits.shape
    chosen = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)

    def nearest(best, k):
        best_distance, _, best_gradient = best
        cotangent = jax.nn.one_hot(jnp.full(b, k), num_classes, dtype=logits.dtype) - chosen
        (gradient,) = pull_back(cotangent)
        difference = logits[:, k] - pick(logits, labels)
        dual_size = NORMS[norm].dual_size(gradient)[:, 0, 0, 0]
        distance = jnp.abs(difference) / (1e-12 + dual_size)
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


def project(points: Array, normal: Array, offset: Array, norm: str) -> Array:
    """The shortest step from points onto the hyperplane <normal, z> = offset within [0, 1].

    points, normal: [b, ...]; offset: [b]. Where the hyperplane misses the box, the step ends at the
    nearest point of the box. Section 3.1 and appendix A of the paper.

    In the shortest step every pixel moves up to a common level or to its bound: by min(level, room)
    in linf, by |normal| min(level, room / |normal|) in l2. ``_water_level`` finds the level that
    reaches the hyperplane. In l1 the pixels with the largest normal move to their bounds, one after
    the other.
    """
    shape = points.shape
    points, normal = (x.reshape(len(x), -1) for x in (points, normal))
    excess = jnp.sum(normal * points, -1) - offset
    normal = jnp.where(excess[:, None] >= 0, normal, -normal)
    room = jnp.where(normal > 0, points, 1 - points)  # distance to the bound, against the normal
    size = jnp.abs(normal)
    if norm == "linf":
        level = _water_level(size, room, jnp.abs(excess))
        return (-jnp.sign(normal) * jnp.minimum(level[:, None], room)).reshape(shape)
    moves = size > _WEIGHT_FLOOR
    if norm == "l1":
        step = _largest_first(jnp.where(moves, size, 0), room, jnp.abs(excess))
        return (-jnp.sign(normal) * step).reshape(shape)
    weights = jnp.where(moves, normal**2, 0)
    room = jnp.where(moves, room / jnp.where(moves, size, 1), 0)
    level = _water_level(weights, room, jnp.abs(excess))
    step = jnp.where(moves, -normal * jnp.minimum(level[:, None], room), 0)
    return step.reshape(shape)


def _largest_first(weights: Array, room: Array, total: Array) -> Array:
    """The step [b, n] of at most ``room`` with sum_i weights_i step_i = total, or
    the nearest to it, in which values of large weight move first.
    """
    order = jnp.argsort(-weights, -1)
    weight, gain = (jnp.take_along_axis(x, order, -1) for x in (weights, weights * room))
    before = jnp.cumsum(gain, -1) - gain
    missing = jnp.maximum(total[:, None] - before, 0)
    partial = missing / jnp.where(weight > 0, weight, 1)
    step = jnp.minimum(partial, jnp.take_along_axis(room, order, -1))
    step = jnp.where(weight > 0, step, 0)
    return jnp.take_along_axis(step, jnp.argsort(order, -1), -1)


def _water_level(weights: Array, room: Array, total: Array) -> Array:
    """The level [b] at which sum_i weights_i min(level, room_i) is ``total``; infinite if none.

    The sum is concave and piecewise linear in the level, so Newton's method from 0 reaches the
    solution exactly after a few iterations. No sort is needed.
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
