"""The attack of a training step: ``draw`` draws all that is random in it, ``perturb`` runs it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_at.attacks import apgd, pgd
from vit_at.attacks.threat import Threat, random_start
from vit_at.models import Apply
from vit_at.training import masking as masks
from vit_at.training.objectives import OBJECTIVES

Array = jax.Array
START_SCALE = 0.001  # a gaussian start is this times N(0, 1), in normalised units
NOISE = 2.0  # a noisy start is uniform in this times the ball: k of de Jorge et al. 2022


class Draws(NamedTuple):
    """Everything random in the attack of one step.

    delta: [B, H, W, C] in pixel units, before it is brought into the image range.
    attn_keep: [steps, num_blocks] bool (ARD); None: off.
    patch_keep: [steps, H/p, W/p] bool (PRM); None: off.
    """

    delta: Array
    attn_keep: Array | None
    patch_keep: Array | None


class Start(NamedTuple):
    """Where an attack starts.

    kind: 'random', as the objective says; 'zero', at the image; 'noise', N-FGSM's, see ``reach``.
    std: of the normalisation, per channel: a normalised unit in pixel units.
    """

    kind: str = "random"
    std: float | tuple[float, ...] = 1.0


def draw(
    key: Array,
    *,
    objective: str,
    threat: Threat,
    masking: masks.Masking,
    progress: float | Array,
    image_shape: tuple[int, int, int, int],
    num_blocks: int,
    start: Start = Start(),  # noqa: B008 - immutable
) -> Draws:
    """Draws what the attack of one step needs.

    Args:
      objective: a name in ``OBJECTIVES``.
      progress: epochs done once this step is, (step + 1) / steps_per_epoch: the warm-up's time.
      image_shape: [B, H, W, C].
    """
    start_key, attn_key, patch_key = jax.random.split(key, 3)
    if start.kind == "zero":
        delta = jnp.zeros(image_shape)
    elif start.kind == "noise":
        delta = random_start(start_key, image_shape, threat.scaled(NOISE))
    elif OBJECTIVES[objective].start == "gaussian":
        scale = START_SCALE * jnp.asarray(start.std)
        delta = scale * jax.random.normal(start_key, image_shape)
    else:
        delta = random_start(start_key, image_shape, threat)
    probability = masks.keep_probability(masking, progress)
    attn_keep = patch_keep = None
    if masking.ard:
        attn_keep = masks.draw_attn_keep(attn_key, threat.steps, num_blocks, probability)
    if masking.prm:
        grid = (image_shape[1] // masking.patch_size, image_shape[2] // masking.patch_size)
        patch_keep = masks.draw_patch_keep(patch_key, threat.steps, grid, probability)
    return Draws(delta, attn_keep, patch_keep)


def reach(threat: Threat, start: str) -> Threat:
    """The threat whose ball the training attack is projected onto.

    N-FGSM (de Jorge et al. 2022, arXiv 2202.01181, Algorithm 1) starts at noise eta, uniform in
    [-2 eps, 2 eps], takes one step eta + eps sign(gradient), and clips the sum to the image range
    alone. Here its ball is as large as noise and steps together, so the projection changes nothing.
    """
    if start != "noise":
        return threat
    return dataclasses.replace(threat, eps=NOISE * threat.eps + threat.steps * threat.step_size)


def perturb(
    apply: Apply,
    params: Any,
    images: Array,
    targets: Array,
    draws: Draws,
    *,
    objective: str,
    threat: Threat,
    method: str = "pgd",
    clean_logits: Array | None = None,
) -> Array:
    """The adversarial images that ``objective`` trains on, in [0, 1].

    A plain per-device function: images, targets and draws.delta are any shard of a batch.

    Args:
      images: [b, H, W, C] in [0, 1]; returned unchanged by an objective without attack.
      targets: [b, num_classes] probabilities.
      method: 'pgd' or 'apgd'.
      clean_logits: of ``images``, if they have been computed before; None: computed here where the
        attack needs them. They do not depend on the perturbation: one pass serves all steps.
    """
    row = OBJECTIVES[objective]
    if row.attack is None:
        return images
    if row.attack_needs_clean:
        clean_logits = apply(params, images) if clean_logits is None else clean_logits
        clean_logits = jax.lax.stop_gradient(clean_logits)

    def losses(images, attn_keep):
        return row.attack(apply(params, images, attn_keep), targets, clean_logits)

    def loss(images, attn_keep):
        # The sum, not the mean: examples do not interact, so the batch's size does not matter.
        return losses(images, attn_keep).sum()

    if method == "apgd":
        return apgd.training_attack(losses, images, draws.delta, draws.attn_keep, threat)
    return pgd.training_attack(loss, images, draws.delta, draws.attn_keep, draws.patch_keep, threat)


def worst(
    apply: Apply,
    params: Any,
    found: Sequence[Array],
    targets: Array,
    *,
    objective: str,
    clean_logits: Array | None,
) -> Array:
    """Of several adversarial images of each image, [b, H, W, C] each, the one of the largest loss.

    MAX of Tramer and Boneh 2019, equation 3, which trains on the worst of several balls.
    """
    attack = OBJECTIVES[objective].attack
    assert attack is not None
    losses = jnp.stack([attack(apply(params, images), targets, clean_logits) for images in found])
    return jnp.stack(list(found))[losses.argmax(0), jnp.arange(len(targets))]
