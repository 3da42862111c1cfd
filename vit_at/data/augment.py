"""Augmentation on the device: random crops and flips of images, and smoothed targets.

Every function is pure, and takes a key and the whole (global) batch. So the result does not depend
on the number of devices. Mixup and CutMix are in ``mixing``.
"""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """Converts uint8 images to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Shifts each image [B, H, W, C] by up to `padding` pixels each way, and fills with black."""
    b, h, w, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (b, 2), 0, 2 * padding + 1)
    for axis in (1, 2):
        padded = _shift(padded, corners[:, axis - 1], axis, 2 * padding)
    return padded[:, :h, :w]


def _shift(images: jax.Array, by: jax.Array, axis: int, most: int) -> jax.Array:
    """Moves each image by ``by`` [B], at most ``most`` pixels, towards the start of an axis.

    It moves by powers of two where a bit of ``by`` is set. A slice of each image would be a gather,
    which a TPU runs image by image.
    """
    for bit in range(most.bit_length()):
        moves = (by >> bit & 1).astype(bool)[:, None, None, None]
        images = jnp.where(moves, jnp.roll(images, -(1 << bit), axis), images)
    return images


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image [B, H, W, C] left to right with probability 1/2."""
    flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Crops and flips images [B, H, W, C]; crop_padding=0 turns off crops, flip=False flips."""
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        images = random_crop(crop_key, images, crop_padding)
    if flip:
        images = random_flip(flip_key, images)
    return images


def one_hot(labels: jax.Array, num_classes: int, label_smoothing: float = 0.0) -> jax.Array:
    """Targets [B, num_classes] with label smoothing s: (1 - s) * one-hot + s / num_classes."""
    hard = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1 - label_smoothing) * hard + label_smoothing / num_classes
