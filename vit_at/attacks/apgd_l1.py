"""Auto-PGD in l1 (Croce and Hein 2021, "Mind the box: l1-APGD for sparse adversarial attacks").

A step moves the values with the largest gradients only. How many depends on how many values the
best perturbation so far changes. The step size shrinks while that number stays the same, and starts
again when it falls. There is no momentum.

A run may have several phases, with balls of falling radius, of which the last is that of the threat
(section 3.3 there). Each phase starts from the projection of the best point of the one before. A
success counts only in the last.

``advance`` is one evaluation for a batch. All state is per image, as in ``apgd``. A phase of n
iterations has n + 1 evaluations: the first is of its start.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks.apgd import Evaluate, where
from vit_at.attacks.norms import NORMS, l1_shift, sparse_sign
from vit_at.attacks.threat import Threat

Array = jax.Array
_FIRST_SHARE = 0.2  # of the values that move in a run without phases, until its first checkpoint
_STEP_SHRINKS = 1.5
_SMALLEST_STEP = 0.1  # of the radius
_CHANGED_TO_MOVED = 1.5  # ratio of the values that are changed to those that move next
_FALLS = 0.95  # a number of changed values below this share of the last one resets the step size


class Phase(NamedTuple):
    """radius: of the ball, in eps; iterations: of the phase."""

    radius: float
    iterations: int


def phases(iterations: int, several: bool) -> tuple[Phase, ...]:
    """The phases of a run: one, or those of the official evaluation, at 3, 2 and 1 times eps."""
    if not several:
        return (Phase(1.0, iterations),)
    first = min(math.ceil(0.3 * iterations), iterations // 2)
    return Phase(3.0, first), Phase(2.0, first), Phase(1.0, iterations - 2 * first)


class State(NamedTuple):
    """One batch of runs. Images and gradients are [b, H, W, C], all else is [b].

    point, gradient: the iterate and the gradient of its loss; best_*: where the loss of the phase
    was largest; adversarial: the misclassified iterate of the largest loss in the last phase,
    adversarial_loss: that loss, -inf before; share: of the values that move; changed: number of
    values that the best point changed at the last checkpoint; evaluation: number done.
    """

    point: Array
    gradient: Array
    best_point: Array
    best_gradient: Array
    adversarial: Array
    adversarial_loss: Array
    best_loss: Array
    step_size: Array
    share: Array
    changed: Array
    robust: Array
    evaluation: Array


def start(images: Array, direction: Array, threat: Threat, schedule: tuple[Phase, ...]) -> State:
    """Starts runs at the projection of images + direction, of a normal distribution."""
    radius = jnp.full(len(images), schedule[0].radius, images.dtype) * threat.eps
    b, dtype = images.shape[0], images.dtype
    zero, nothing = jnp.zeros(b, dtype), jnp.zeros_like(images)
    return State(
        point=images,
        gradient=nothing,
        best_point=_into_ball(images + direction, images, radius),
        best_gradient=nothing,
        adversarial=images,
        adversarial_loss=zero - jnp.inf,
        best_loss=zero - jnp.inf,
        step_size=zero,
        share=zero,
        changed=zero,
        robust=jnp.ones(b, bool),
        evaluation=jnp.zeros(b, jnp.int32),
    )


def advance(
    evaluate: Evaluate, images: Array, state: State, threat: Threat, schedule: tuple[Phase, ...]
) -> tuple[State, Array]:
    """One evaluation, and the loss [b] there; evaluate: as for ``apgd.advance``."""
    begins = np.cumsum([0, *(1 + phase.iterations for phase in schedule)])
    number = jnp.sum(state.evaluation[:, None] >= jnp.asarray(begins[1:-1], jnp.int32), -1)
    within = state.evaluation - jnp.asarray(begins, jnp.int32)[number]  # the phase
    radius = jnp.asarray([p.radius for p in schedule], images.dtype)[number] * threat.eps
    period = jnp.asarray([max(int(0.04 * p.iterations), 1) for p in schedule])[number]
    last, opens = number == len(schedule) - 1, within == 0

    state = where(opens, _open(images, state, radius, len(schedule) > 1), state)
    point = where(opens, state.point, _move(images, state, radius))
    loss, gradient, correct = evaluate(point)
    better = opens | (loss > state.best_loss)
    found = last & ~correct & ~(loss <= state.adversarial_loss)
    state = state._replace(
        point=point,
        gradient=gradient,
        best_point=where(better, point, state.best_point),
        best_gradient=where(better, gradient, state.best_gradient),
        adversarial=where(found, point, state.adversarial),
        adversarial_loss=jnp.where(found, loss, state.adversarial_loss),
        best_loss=jnp.where(better, loss, state.best_loss),
        robust=state.robust & (correct | ~last),
        evaluation=state.evaluation + 1,
    )
    due = ~opens & (within % period == 0)
    return where(due, _checkpoint(images, state, radius), state), loss


def _changed(point: Array, images: Array) -> Array:
    """The number of values that differ, [b]."""
    return jnp.sum(point != images, tuple(range(1, images.ndim))).astype(images.dtype)


def _project(point: Array, images: Array, radius: Array) -> Array:
    return NORMS["l1"].project_image(point, images, radius[:, None, None, None])


def _into_ball(point: Array, images: Array, radius: Array) -> Array:
    """``_project`` as the official code rounds it between phases. Rounding counts as a change."""
    return point + l1_shift(point - images, images, radius[:, None, None, None])


def _open(images: Array, state: State, radius: Array, several: bool) -> State:
    """The start of a phase: the best point before, projected."""
    point = jnp.clip(_into_ball(state.best_point, images, radius), 0, 1)
    count = jnp.full(len(images), images[0].size, images.dtype)
    changed = _changed(point, images) if several else count
    share = changed / count / _CHANGED_TO_MOVED if several else 0 * count + _FIRST_SHARE
    return state._replace(point=point, step_size=radius, share=share, changed=changed)


def _move(images: Array, state: State, radius: Array) -> Array:
    """A step along the signs of the largest gradients, and the projection."""
    signs = sparse_sign(state.gradient, state.share)
    step_size = state.step_size[:, None, None, None]
    moved = state.point + step_size * signs / (NORMS["l1"].size(signs) + 1e-10)
    return _project(moved, images, radius)


def _checkpoint(images: Array, state: State, radius: Array) -> State:
    """Sets the share of values that move; shrinks the step or restarts from the best point."""
    changed = _changed(state.best_point, images)
    falls = changed / state.changed < _FALLS
    shrunk = jnp.maximum(state.step_size / _STEP_SHRINKS, _SMALLEST_STEP * radius)
    return state._replace(
        point=where(falls, state.best_point, state.point),
        gradient=where(falls, state.best_gradient, state.gradient),
        step_size=jnp.where(falls, radius, shrunk),
        share=changed / images[0].size / _CHANGED_TO_MOVED,
        changed=changed,
    )
