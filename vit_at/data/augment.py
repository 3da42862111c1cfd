"""Augmentation on the device: crop and flip per image, mixup and CutMix per batch.

Everything is a pure function of a key and a whole (global) batch, so it can be jitted and replayed,
and gives the same result on any number of devices. Randomness is drawn first and then applied:
`mix` is `draw_mixing` followed by `apply_mixing`, which can be checked on its own.

Mixup (Zhang et al., arXiv 1710.09412) blends each image with a partner; CutMix (Yun et al., arXiv
1905.04899) pastes a box of the partner. As in timm's mode 'batch', the partner of image i is image
B-1-i, and one lambda and one box serve the whole batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """Turns uint8 images into float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Shifts each image [B, H, W, C] by up to `padding` pixels each way; black comes in."""
    b, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (b, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image [B, H, W, C] left to right with probability 1/2."""
    flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Crops and flips images [B, H, W, C]; crop_padding 0 and flip False leave out a part."""
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        images = random_crop(crop_key, images, crop_padding)
    if flip:
        images = random_flip(flip_key, images)
    return images


def one_hot(labels: jax.Array, num_classes: int, label_smoothing: float = 0.0) -> jax.Array:
    """Returns targets [B, num_classes]: (1 - s) * one-hot + s / num_classes, as in PyTorch."""
    hard = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1 - label_smoothing) * hard + label_smoothing / num_classes


class Mixing(NamedTuple):
    """How a batch is mixed with its reverse.

    Attributes:
      lam: [] weight of an image's own target; 1: the batch is not mixed.
      box: [4] int32 (y_low, y_high, x_low, x_high), half open, of the pixels that CutMix takes from
        the partner; empty: mixup, all pixels are blended with weight lam.
    """

    lam: jax.Array
    box: jax.Array


def cutmix_box(lam: jax.Array, centre: jax.Array, size: int) -> Mixing:
    """Returns the box of area (1 - lam) * size**2 around centre [2] (y, x), clipped to the image.

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
      probability: that the batch is mixed at all.
      mixup_alpha: lambda ~ Beta(alpha, alpha) of mixup; 0: only CutMix.
      cutmix_alpha: likewise of CutMix; 0: only mixup. Both 0: no mixing.
      cutmix_probability: that a mixed batch uses CutMix, where both are on.
    """
    neither = Mixing(jnp.float32(1), jnp.zeros(4, jnp.int32))
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return neither
    if mixup_alpha == 0 or cutmix_alpha == 0:
        cutmix_probability = float(mixup_alpha == 0)
    mixed_key, cutmix_key, mixup_lam_key, cutmix_lam_key, centre_key = jax.random.split(key, 5)
    # An alpha of 0 is off, and Beta(1, 1) stands in for the draw that is then never used.
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
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    probability: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
) -> tuple[jax.Array, jax.Array]:
    """Draws a mixing (see `draw_mixing`) and applies it to float images and soft targets."""
    mixing = draw_mixing(
        key,
        images.shape[1],
        probability=probability,
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        cutmix_probability=cutmix_probability,
    )
    return apply_mixing(images, targets, mixing)
