"""Auto-PGD: projected gradient ascent that halves its own step (Croce and Hein 2020, Algorithm 1).

``advance`` is one iteration for a batch: the move with momentum, the losses at the new point, the
best point so far, and at checkpoints the test of whether to halve the step and go back to the best
point. Every quantity is kept per image, the iteration too: a slot of the batch can take another
image at any time. The first call evaluates the start itself.

    state = start(images, draws, norm, eps)
    for _ in range(1 + iterations): state, loss = advance(evaluate, images, state, options)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_at.attacks import losses

Array = jax.Array
Evaluate = Callable[[Array], tuple[Array, Array, Array]]
LOSSES = ("ce", "dlr", "targeted dlr")
_MOMENTUM = 0.75  # share of the new step; the rest goes on in the last direction
_INCREASES = 0.75  # rho: the step is halved if fewer of its iterations increased the loss
_NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class Options:
    """norm: linf or l2; eps: radius in pixel units; iterations: gradient steps of one run."""

    norm: str = "linf"
    eps: float | Array = 8 / 255
    iterations: int = 100

    @property
    def periods(self) -> tuple[int, int, int]:
        """Iterations to the first checkpoint, by how much each period is shorter, the shortest."""
        return tuple(max(int(share * self.iterations), 1) for share in (0.22, 0.03, 0.06))


class State(NamedTuple):
    """One batch of runs; images are [b, H, W, C], all else [b].

    point: the iterate, whose loss has ``gradient``; previous: the iterate before; best_*: where the
    loss was largest; adversarial: the last misclassified iterate (the start if there is none);
    checked_loss, halved: best loss and outcome of the last checkpoint; increases: of the loss since
    then; iteration: steps made, -1 before the start is evaluated.
    """

    point: Array
    previous: Array
    gradient: Array
    best_point: Array
    best_gradient: Array
    adversarial: Array
    last_loss: Array
    best_loss: Array
    step_size: Array
    checked_loss: Array
    halved: Array
    robust: Array
    increases: Array
    period: Array
    since_check: Array
    iteration: Array


def random_direction(key: Array, shape: tuple[int, ...], norm: str) -> Array:
    """One image's start before scaling: uniform in [-1, 1] (linf) or normal (l2)."""
    if norm == "linf":
        return jax.random.uniform(key, shape, minval=-1.0)
    return jax.random.normal(key, shape)


def start(images: Array, direction: Array, options: Options) -> State:
    """A run that begins on the boundary of the ball, in ``direction``, clipped to [0, 1]."""
    return start_at(jnp.clip(images + options.eps * _unit(direction, options.norm), 0, 1), options)


def start_at(point: Array, options: Options) -> State:
    """A run that begins at ``point`` [b, H, W, C]."""
    b, dtype = point.shape[0], point.dtype
    zero, nothing, count = jnp.zeros(b, dtype), jnp.zeros_like(point), jnp.zeros(b, jnp.int32)
    return State(
        point=point,
        previous=point,
        gradient=nothing,
        best_point=point,
        best_gradient=nothing,
        adversarial=point,
        last_loss=zero,
        best_loss=zero - jnp.inf,
        step_size=zero + 2 * options.eps,
        checked_loss=zero,
        halved=jnp.ones(b, bool),
        robust=jnp.ones(b, bool),
        increases=count,
        period=count + options.periods[0],
        since_check=count,
        iteration=count - 1,
    )


def advance(
    evaluate: Evaluate, images: Array, state: State, options: Options
) -> tuple[State, Array]:
    """One iteration of Algorithm 1, and the loss [b] at the new point.

    evaluate: points [b, H, W, C] -> (loss [b], its gradient [b, H, W, C], correct [b] bool).
    """
    starting = state.iteration < 0
    point = where(starting, state.point, _move(images, state, options))
    loss, gradient, correct = evaluate(point)
    better = loss > state.best_loss
    best_loss = jnp.where(better, loss, state.best_loss)
    counts = ~starting
    state = state._replace(
        point=point,
        previous=state.point,
        gradient=gradient,
        best_point=where(better, point, state.best_point),
        best_gradient=where(better, gradient, state.best_gradient),
        adversarial=where(correct, state.adversarial, point),
        # The first step's loss is compared with 0, not with the start's, as in the official code.
        last_loss=jnp.where(starting, 0, loss),
        best_loss=best_loss,
        checked_loss=jnp.where(starting, loss, state.checked_loss),
        robust=state.robust & correct,
        increases=state.increases + (counts & (loss > state.last_loss)),
        since_check=state.since_check + counts,
        iteration=state.iteration + 1,
    )
    return _checkpoint(state, options), loss


def _move(images: Array, state: State, options: Options) -> Array:
    """The gradient step with momentum, equation 2 and the line after it."""
    share = per_image(jnp.where(state.iteration > 0, _MOMENTUM, 1.0).astype(images.dtype))
    step_size = per_image(state.step_size)
    direction = jnp.sign if options.norm == "linf" else lambda g: _unit(g, "l2")
    ascended = _project(state.point + step_size * direction(state.gradient), images, options)
    momentum = state.point - state.previous
    moved = state.point + (ascended - state.point) * share + momentum * (1 - share)
    return _project(moved, images, options)


def _project(point: Array, images: Array, options: Options) -> Array:
    """Into the ball around the images, then into [0, 1]."""
    eps = options.eps
    if options.norm == "linf":
        point = jnp.clip(point, images - eps, images + eps)
    else:
        delta = point - images
        point = images + _unit(delta, "l2") * jnp.minimum(eps, length(delta, "l2"))
    return jnp.clip(point, 0, 1)


def _checkpoint(state: State, options: Options) -> State:
    """Where a period ends: conditions 1 and 2 of section 3.2, and the restart from the best."""
    _, decrement, shortest = options.periods
    due = state.since_check == state.period
    oscillates = state.increases <= _INCREASES * state.period
    stalls = ~state.halved & (state.checked_loss >= state.best_loss)
    halve = due & (oscillates | stalls)
    return state._replace(
        point=where(halve, state.best_point, state.point),
        gradient=where(halve, state.best_gradient, state.gradient),
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        checked_loss=jnp.where(due, state.best_loss, state.checked_loss),
        halved=jnp.where(due, halve, state.halved),
        increases=jnp.where(due, 0, state.increases),
        since_check=jnp.where(due, 0, state.since_check),
        period=jnp.where(due, jnp.maximum(state.period - decrement, shortest), state.period),
    )


def loss_and_gradient(
    logits_fn: Callable[..., Array],
    loss: str,
    points: Array,
    labels: Array,
    targets: Array,
    keys: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(loss [b], gradient [b, H, W, C], correct [b]) of one of ``LOSSES`` at some points.

    logits_fn: points -> logits [b, K]; with keys, (points, key of one draw) -> logits.
    targets: [b] classes, for the targeted loss.
    keys: [samples]: expectation over transformation. The gradient is the mean over the samples; the
      loss and the prediction are the last sample's, as in the official code.
    """

    def total(x, *key):
        logits = logits_fn(x, *key)
        values = _loss(loss, logits, labels, targets)
        return values.sum(), (values, jnp.argmax(logits, -1) == labels)

    gradient_of = jax.grad(total, has_aux=True)
    if keys is None:
        gradient, (values, correct) = gradient_of(points)
        return values, gradient, correct

    def sample(summed, key):
        gradient, aux = gradient_of(points, key)
        return summed + gradient, aux

    summed, (values, correct) = jax.lax.scan(sample, jnp.zeros_like(points), keys)
    return values[-1], summed / len(keys), correct[-1]


def _loss(name: str, logits: Array, labels: Array, targets: Array) -> Array:
    if name == "ce":
        return losses.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
    if name == "dlr":
        return losses.dlr(logits, labels)
    return losses.targeted_dlr(logits, labels, targets)


def per_image(values: Array) -> Array:
    """[b] -> [b, 1, 1, 1]."""
    return values[:, None, None, None]


def where(condition: Array, yes: Array, no: Array) -> Array:
    """Chooses whole images: condition [b], the others [b, H, W, C]."""
    return jnp.where(per_image(condition), yes, no)


def length(x: Array, norm: str) -> Array:
    """The norm of each image of [b, H, W, C], [b, 1, 1, 1]."""
    axes = (1, 2, 3)
    if norm == "linf":
        return jnp.max(jnp.abs(x), axes, keepdims=True)
    return jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))


def _unit(x: Array, norm: str) -> Array:
    """x scaled to norm 1; 0 stays 0."""
    return x / (length(x, norm) + _NORM_FLOOR)
