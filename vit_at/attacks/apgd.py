"""Auto-PGD: projected gradient ascent that halves its own step (Croce and Hein 2020, Algorithm 1).

``advance`` is one iteration for a batch: a step with momentum, the loss at the new point, the best
point so far, and at checkpoints the decision whether to halve the step and restart from the best
point. All state is per image, including the iteration, so any image of the batch can be replaced at
any time. The first call evaluates the start itself.

    state = start(images, norms.random_directions(keys, images.shape[1:], norm), threat)
    for _ in range(1 + threat.steps):
        state, loss = advance(evaluate, images, state, threat)

The step size of the ``Threat`` is not used.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vit_at.attacks import losses
from vit_at.attacks.norms import NORMS, resize_as_official
from vit_at.attacks.threat import Threat, into_image_range

Array = jax.Array
Evaluate = Callable[[Array], tuple[Array, Array, Array]]
LOSSES = ("ce", "dlr", "targeted dlr")
_MOMENTUM = 0.75  # alpha: weight of the new step; the rest repeats the last move
RHO = 0.75  # the step is halved if a smaller share of a period's iterations increased the loss


def periods(iterations: int) -> tuple[int, int, int]:
    """Lengths in iterations: of the first period, its decrement, of the shortest period."""
    return tuple(max(int(share * iterations), 1) for share in (0.22, 0.03, 0.06))


class State(NamedTuple):
    """One batch of runs. Images and gradients are [b, H, W, C], all else is [b].

    point, gradient: the iterate and the gradient of its loss; previous: the iterate before.
    best_*: where the loss was largest; adversarial: the misclassified iterate of the largest loss,
    or the start; adversarial_loss: that loss, -inf if there is none.
    checked_loss, halved: best loss at the last checkpoint, and whether it halved the step.
    increases, since_check: of the loss, and iterations, since the last checkpoint.
    period: iterations between checkpoints; iteration: steps done, -1 before the first evaluation.
    """

    point: Array
    previous: Array
    gradient: Array
    best_point: Array
    best_gradient: Array
    adversarial: Array
    adversarial_loss: Array
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


def start(images: Array, direction: Array, threat: Threat) -> State:
    """Starts runs on the boundary of the ball, in a direction [b, H, W, C], clipped to [0, 1]."""
    size = NORMS[threat.norm].size(direction)
    delta = resize_as_official(direction, size, threat.eps)
    return start_at(jnp.clip(images + delta, 0, 1), threat)


def start_at(point: Array, threat: Threat) -> State:
    """Starts runs at ``point`` [b, H, W, C]."""
    b, dtype = point.shape[0], point.dtype
    zero, nothing, count = jnp.zeros(b, dtype), jnp.zeros_like(point), jnp.zeros(b, jnp.int32)
    return State(
        point=point,
        previous=point,
        gradient=nothing,
        best_point=point,
        best_gradient=nothing,
        adversarial=point,
        adversarial_loss=zero - jnp.inf,
        last_loss=zero,
        best_loss=zero - jnp.inf,
        step_size=zero + 2 * threat.eps,
        checked_loss=zero,
        halved=jnp.ones(b, bool),
        robust=jnp.ones(b, bool),
        increases=count,
        period=count + periods(threat.steps)[0],
        since_check=count,
        iteration=count - 1,
    )


def advance(
    evaluate: Evaluate, images: Array, state: State, threat: Threat, rho: float = RHO
) -> tuple[State, Array]:
    """One iteration of Algorithm 1, and the loss [b] at the new point.

    evaluate: points [b, H, W, C] -> (loss [b], its gradient [b, H, W, C], correct [b] bool).
    """
    starting = state.iteration < 0
    point = where(starting, state.point, _move(images, state, threat))
    loss, gradient, correct = evaluate(point)
    better = loss > state.best_loss
    best_loss = jnp.where(better, loss, state.best_loss)
    counts = ~starting
    found = ~correct & ~(loss <= state.adversarial_loss)  # a NaN is found, too
    state = state._replace(
        point=point,
        previous=state.point,
        gradient=gradient,
        best_point=where(better, point, state.best_point),
        best_gradient=where(better, gradient, state.best_gradient),
        adversarial=where(found, point, state.adversarial),
        adversarial_loss=jnp.where(found, loss, state.adversarial_loss),
        # As in the official code, the first step's loss is compared with 0, not with the start's.
        last_loss=jnp.where(starting, 0, loss),
        best_loss=best_loss,
        checked_loss=jnp.where(starting, loss, state.checked_loss),
        robust=state.robust & correct,
        increases=state.increases + (counts & (loss > state.last_loss)),
        since_check=state.since_check + counts,
        iteration=state.iteration + 1,
    )
    return _checkpoint(state, threat, rho), loss


def _move(images: Array, state: State, threat: Threat) -> Array:
    """The gradient step with momentum, equation 2 and the line after it."""
    weight = jnp.where(state.iteration > 0, _MOMENTUM, 1.0).astype(images.dtype)
    weight, step_size = (x[:, None, None, None] for x in (weight, state.step_size))
    norm = NORMS[threat.norm]
    step = norm.steepest_step(state.gradient, step_size, resize_as_official)
    ascended = _project(state.point + step, images, threat)
    momentum = state.point - state.previous
    moved = state.point + (ascended - state.point) * weight + momentum * (1 - weight)
    return _project(moved, images, threat)


def _project(point: Array, images: Array, threat: Threat) -> Array:
    """Onto the ball around the images, then into [0, 1]."""
    return jnp.clip(NORMS[threat.norm].project_image(point, images, threat.eps), 0, 1)


def _checkpoint(state: State, threat: Threat, rho: float) -> State:
    """At the end of a period: conditions 1 and 2 of section 3.2, and the restart from the best."""
    _, decrement, shortest = periods(threat.steps)
    due = state.since_check == state.period
    oscillates = state.increases <= rho * state.period
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


def training_attack(
    losses_at: Callable[[Array, Array | None], Array],
    images: Array,
    delta: Array,
    attn_keep: Array | None,
    threat: Threat,
) -> Array:
    """The points of the largest loss after ``threat.steps`` iterations: APGD-2, APGD-3, ...

    Singh et al. 2023, "Revisiting Adversarial Training for ImageNet", train with 2 or 3 from a zero
    start. Each iteration costs a pass forward and back; the last point, one more forward.

    Args:
      losses_at: (images [b, H, W, C], block mask [num_blocks] or None) -> [b].
      images: in [0, 1].
      delta: initial perturbation [b, H, W, C]; clipped to the image range first.
      attn_keep: [steps, num_blocks] bool, ARD; None: off.

    Returns:
      Adversarial images in [0, 1].
    """
    correct = jnp.ones(len(images), bool)  # an attack in training does not stop at a success

    def with_gradient(keep, points):
        values, pull = jax.vjp(lambda x: losses_at(x, keep), points)
        return values, losses.finite_or_zero(pull(jnp.ones_like(values))[0]), correct

    def iteration(state, keep):
        return advance(functools.partial(with_gradient, keep), images, state, threat)[0], None

    def without_gradient(points):
        return losses_at(points, None), jnp.zeros_like(points), correct

    state = start_at(images + into_image_range(delta, images), threat)
    state, _ = lax.scan(iteration, state, attn_keep, length=threat.steps)
    return advance(without_gradient, images, state, threat)[0].best_point


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
    keys: [samples], for expectation over transformation. The gradient is the mean over the samples;
      loss and prediction are the last sample's, as in the official code.
    """

    def total(x, *key):
        logits = logits_fn(x, *key)
        values = _loss(loss, logits, labels, targets)
        return values.sum(), (values, losses.is_correct(logits, labels))

    gradient_of = jax.grad(total, has_aux=True)
    if keys is None:
        gradient, (values, correct) = gradient_of(points)
        return values, losses.finite_or_zero(gradient), correct

    def sample(summed, key):
        gradient, aux = gradient_of(points, key)
        return summed + losses.finite_or_zero(gradient), aux

    summed, (values, correct) = jax.lax.scan(sample, jnp.zeros_like(points), keys)
    return values[-1], summed / len(keys), correct[-1]


def _loss(name: str, logits: Array, labels: Array, targets: Array) -> Array:
    if name == "ce":
        return losses.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
    if name == "dlr":
        return losses.dlr(logits, labels)
    return losses.targeted_dlr(logits, labels, targets)


def where(condition: Array, yes: Any, no: Any) -> Any:
    """Selects per image: condition [b], the others arrays [b, ...] or trees of them."""

    def select(a, b):
        return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(select, yes, no)
