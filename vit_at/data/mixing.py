"""Mixup and CutMix on the device: a batch is mixed with its own reverse.

Mixup (Zhang et al., arXiv 1710.09412) blends each image with a partner. CutMix (Yun et al., arXiv
1905.04899) pastes a box of the partner. As in timm's mode 'batch', the partner of image i is image
B-1-i, and the whole batch shares one lambda and one box. `mix` is `draw_mixing`, which holds all
randomness, followed by `apply_mixing`, which is deterministic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixing(NamedTuple):
    """How a batch is mixed with its reverse.

    Attributes:
      lam: [] weight of an image's own target; 1 means that the batch is not mixed.
      box: [4] int32 (y_low, y_high, x_low, x_high), half open: CutMix takes these pixels from the
        partner. An empty box means mixup: all pixels are blended with weight lam.
    """

    lam: jax.Array
    box: jax.Array


def cutmix_box(lam: jax.Array, centre: jax.Array, size: int) -> Mixing:
    """CutMix with a box of area (1 - lam) * size**2 around centre [2] (y, x), clipped to the image.

    Its sides are 2 * (int(size * sqrt(1 - lam)) // 2), and lam is recomputed from the clipped area.
    """
    half = (size * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    low, high = jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)
    area = jnp.prod(high - low)
    box = jnp.stack([low[0], high[0], low[1], high[1]]).astype(jnp.int32)
    return Mixing(1 - area / size**2, box)


def draw_mixing(
    key: jax.Array,
    size: int,
    *,
    probability: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
) -> Mixing:
    """Draws whether and how a batch of size x size images is mixed.

    Args:
      probability: of mixing the batch at all.
      mixup_alpha: mixup's lambda ~ Beta(alpha, alpha); 0 turns mixup off.
      cutmix_alpha: CutMix's lambda ~ Beta(alpha, alpha); 0 turns CutMix off.
      cutmix_probability: of CutMix instead of mixup, if both are on.
    """
    neither = Mixing(jnp.float32(1), jnp.zeros(4, jnp.int32))
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return neither
    if mixup_alpha == 0 or cutmix_alpha == 0:
        cutmix_probability = float(mixup_alpha == 0)
    mixed_key, cutmix_key, mixup_lam_key, cutmix_lam_key, centre_key = jax.random.split(key, 5)
    # With an alpha of 0 the draw is never used; Beta(1, 1) keeps it valid.
    mixup_lam = jax.random.beta(mixup_lam_key, mixup_alpha or 1.0, mixup_alpha or 1.0)
    cutmix_lam = jax.random.beta(cutmix_lam_key, cutmix_alpha or 1.0, cutmix_alpha or 1.0)
    cutmix = cutmix_box(cutmix_lam, jax.random.randint(centre_key, (2,), 0, size), size)
    mixup = Mixing(mixup_lam, neither.box)
    use_cutmix = jax.random.bernoulli(cutmix_key, cutmix_probability)
    use_mixing = jax.random.bernoulli(mixed_key, probability)
    chosen = jax.tree.map(lambda a, b: jnp.where(use_cutmix, a, b), cutmix, mixup)
    return jax.tree.map(lambda a, b: jnp.where(use_mixing, a, b), chosen, neither)


def apply_mixing(
    images: jax.Array, targets: jax.Array, mixing: Mixing
) -> tuple[jax.Array, jax.Array]:
    """Mixes float images [B, H, W, C] and targets [B, num_classes] with the reversed batch."""
    _, h, w, _ = images.shape
    y_low, y_high, x_low, x_high = mixing.box
    rows, columns = jnp.arange(h)[:, None], jnp.arange(w)[None, :]
    inside = (rows >= y_low) & (rows < y_high) & (columns >= x_low) & (columns < x_high)
    is_cutmix = (y_high > y_low) & (x_high > x_low)
    own = jnp.where(is_cutmix, jnp.where(inside, 0, 1), mixing.lam)
    own = own.astype(images.dtype)[:, :, None]  # weight of an image's own pixels, [H, W, 1]
    lam = mixing.lam.astype(targets.dtype)
    return own * images + (1 - own) * images[::-1], lam * targets + (1 - lam) * targets[::-1]


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, **options: float
) -> tuple[jax.Array, jax.Array]:
    """Draws a mixing with the options of `draw_mixing`; applies it to float images and targets."""
    return apply_mixing(images, targets, draw_mixing(key, images.shape[1], **options))
