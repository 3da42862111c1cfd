"""Projected gradient descent (PGD) for training and for evaluation.

training_attack   a fixed number of steps with the paper's two maskings: ARD stops the gradient
                  through chosen attention blocks, PRM zeroes the perturbation on chosen patches
pgd_attack        PGD and CW evaluation: an example stops moving once it is misclassified

Both are plain per-device functions of one shard of a batch, without collectives.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vit_at.attacks import inputs, losses
from vit_at.attacks.threat import Threat, ascend, into_ball, into_image_range, random_start
from vit_at.errors import UserError

Array = jax.Array
LOSSES = ("ce", "cw")


def training_attack(
    loss: Callable[[Array, Array | None], Array],
    images: Array,
    delta: Array,
    attn_keep: Array | None,
    patch_keep: Array | None,
    threat: Threat,
) -> Array:
    """Maximises ``loss`` over the perturbation, as the paper's Algorithm 1 does.

    Each step masks the perturbation, takes the gradient at the masked perturbation and moves all
    patches, so a masked patch restarts from 0. The last perturbation is not masked.
    ``training.masking`` says when and how much is masked.

    Args:
      loss: (images [b, H, W, C], block mask [num_blocks] or None) -> scalar.
      images: in [0, 1].
      delta: initial perturbation [b, H, W, C]; clipped to the image range first.
      attn_keep: [steps, num_blocks] bool, ARD; None: off.
      patch_keep: [steps, H/p, W/p] bool, PRM; None: off.

    Returns:
      Adversarial images in [0, 1].
    """

    def attack_step(delta, masks):
        attn_keep, patch_keep = masks
        if patch_keep is not None:
            delta = delta * _to_pixels(patch_keep, images.shape, delta.dtype)
        gradient = jax.grad(lambda d: loss(images + d, attn_keep))(delta)
        return ascend(delta, gradient, images, threat), None

    delta = into_image_range(delta, images)
    delta, _ = lax.scan(attack_step, delta, (attn_keep, patch_keep), length=threat.steps)
    return jnp.clip(images + delta, 0, 1)  # without the rounding error of the sum


def _to_pixels(patch_keep: Array, image_shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """[H/p, W/p] -> [H, W, 1]: each pixel gets the value of its patch."""
    _, height, width, _ = image_shape
    rows, columns = patch_keep.shape
    mask = jnp.repeat(jnp.repeat(patch_keep, height // rows, 0), width // columns, 1)
    return mask[..., None].astype(dtype)


def pgd_attack(
    logits_fn: Callable[[Array], Array],
    images: Array,
    labels: Array,
    key: Array | None,
    threat: Threat,
    *,
    loss: str = "ce",
    restarts: int = 1,
    init: Array | None = None,
) -> Array:
    """PGD (loss "ce") or CW (loss "cw") for evaluation.

    An example moves only while it is classified correctly. The first successful restart is kept,
    and if none succeeds, the one with the largest loss.

    Args:
      logits_fn: images [b, H, W, C] in [0, 1] -> logits [b, K].
      labels: [b] integers.
      key: for the uniform random starts; unused if ``init`` is given.
      threat: its numbers may be arrays that broadcast against the images, such as [b, 1, 1, 1].
      init: [restarts, b, H, W, C] initial perturbations in pixel units, to fix the randomness; what
        is outside of the ball is projected onto it.

    Returns:
      Adversarial images [b, H, W, C] in [0, 1], within the ball of the threat; in float32 if the
      images are narrower.

    Raises:
      UserError: an argument is not allowed; values are checked only outside of jit.
    """
    images, labels = inputs.as_array("images", images), inputs.as_array("labels", labels)
    init = None if init is None else inputs.as_array("init", init)
    num_classes = _check(logits_fn, images, labels, threat, loss, restarts, init)
    images, labels = losses.at_least_float32(images), jnp.asarray(labels)
    if init is None:
        starts = [random_start(k, images.shape, threat) for k in _keys(key, restarts)]
        init = jnp.stack(starts)
    attack = functools.partial(_one_restart, logits_fn, images, labels, num_classes, threat, loss)
    if len(init) == 1:  # the score is not needed, so XLA removes the pass that computes it
        delta, _ = attack(init[0].astype(images.dtype))
        return jnp.clip(images + delta, 0, 1)

    def restart(best, start):
        best_delta, best_score = best
        delta, score = attack(start.astype(images.dtype))
        better = score > best_score
        best_delta = jnp.where(better[:, None, None, None], delta, best_delta)
        return (best_delta, jnp.where(better, score, best_score)), None

    nothing = (jnp.zeros_like(images), jnp.full(labels.shape, -jnp.inf, images.dtype))
    (delta, _), _ = lax.scan(restart, nothing, init)
    return jnp.clip(images + delta, 0, 1)


def _check(logits_fn, images, labels, threat, loss, restarts, init) -> int:
    """Raises UserError for an argument that is not allowed; returns the number of classes."""
    inputs.check_shapes(images, labels)
    inputs.check_threat(threat, math.prod(images.shape[1:]))
    inputs.check_range(images)
    if loss not in LOSSES:
        raise UserError(f"loss '{loss}' is unknown; use one of {', '.join(LOSSES)}")
    inputs.check_count("restarts", restarts)
    if init is not None:
        _check_starts(init, images.shape)
    logits = inputs.output_shape(logits_fn, images)
    if getattr(logits, "shape", ())[:-1] != labels.shape:
        raise UserError(f"logits_fn gives {logits}; it must give logits [{len(images)}, classes]")
    inputs.check_classes(labels, logits.shape[1])
    return logits.shape[1]


def _check_starts(init, shape) -> None:
    if init.shape[1:] != shape or not len(init):
        raise UserError(
            f"init has the shape {init.shape}; it must be [restarts, *{shape}], one start for each "
            "restart and image, and at least one restart"
        )
    if not isinstance(init, jax.core.Tracer) and not np.isfinite(np.asarray(init, float)).all():
        raise UserError("init holds NaN or infinity; give finite perturbations in pixel units")


def _keys(key, restarts) -> Array:
    """One key for each restart; UserError if ``key`` is none."""
    if key is None:
        raise UserError("give a key for the random starts, or the starts themselves as init")
    try:
        return jax.random.split(key, restarts)
    except (TypeError, ValueError) as error:
        shown = " ".join(repr(key).split())[:80]
        raise UserError(f"key is {shown}, which is no key; give jax.random.key(0), say") from error


def _one_restart(logits_fn, images, labels, num_classes, threat, loss, start):
    """(delta, score [b]) of one run. The score is the loss, or infinite for a success."""
    targets = jax.nn.one_hot(labels, num_classes)

    def losses_at(delta):
        logits = losses.at_least_float32(logits_fn(images + delta))
        if loss == "cw":
            values = losses.cw_margin(logits, labels)
        else:
            values = losses.cross_entropy(logits, targets)
        return values, losses.is_correct(logits, labels)

    def total_loss(delta):
        values, correct = losses_at(delta)
        return values.sum(), correct

    def unfinished(carry):
        step, _, active = carry
        return (step < threat.steps) & active.any()

    def attack_step(carry):
        step, delta, active = carry
        gradient, correct = jax.grad(total_loss, has_aux=True)(delta)
        active &= correct
        moved = ascend(delta, losses.finite_or_zero(gradient), images, threat)
        return step + 1, jnp.where(active[:, None, None, None], moved, delta), active

    delta = into_image_range(into_ball(start, threat), images)
    carry = (jnp.zeros((), jnp.int32), delta, jnp.ones_like(labels, bool))
    _, delta, _ = lax.while_loop(unfinished, attack_step, carry)
    values, correct = losses_at(delta)
    return delta, jnp.where(correct, values, jnp.inf).astype(delta.dtype)
