"""Augmentation on the device: crops, flips and what ``data.augment`` names, and smoothed targets.

random-resized-crop[-A]   a crop of at least a share A of the area (0.08), resized back
randaugment[-N-M]         N operations (2) at magnitude M of 30 (9), see ``randaugment``
color-jitter[-S]          brightness, contrast and saturation by factors from 1 - S to 1 + S (0.4)
random-erasing[-P]        with probability P (0.25), a rectangle of random pixels

Every function is pure and keyed, each image of the global batch by a key of its own. So the result
does not depend on the number of devices. Crops are of images that have been resized to
``data.image_size`` already. Mixup and CutMix are in ``mixing``.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_at.data import randaugment
from vit_at.errors import UserError, nearest

Array = jax.Array
_ASPECTS = (3 / 4, 4 / 3)  # of random resized crops, as in torchvision and timm
_ERASED, _ERASED_ASPECTS = (0.02, 1 / 3), (0.3, 1 / 0.3)  # areas and aspects, as in timm
_TRIES = 10  # at a box that fits; as in torchvision and timm


def to_float(images: Array) -> Array:
    """Converts uint8 images to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def random_crop(key: Array, images: Array, padding: int) -> Array:
    """Shifts each image [B, H, W, C] by up to `padding` pixels each way, and fills with black."""
    b, h, w, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (b, 2), 0, 2 * padding + 1)
    for axis in (1, 2):
        padded = _shift(padded, corners[:, axis - 1], axis, 2 * padding)
    return padded[:, :h, :w]


def _shift(images: Array, by: Array, axis: int, most: int) -> Array:
    """Moves each image by ``by`` [B], at most ``most`` pixels, towards the start of an axis.

    It moves by powers of two where a bit of ``by`` is set. A slice of each image would be a gather,
    which a TPU runs image by image.
    """
    for bit in range(most.bit_length()):
        moves = (by >> bit & 1).astype(bool)[:, None, None, None]
        images = jnp.where(moves, jnp.roll(images, -(1 << bit), axis), images)
    return images


def random_flip(key: Array, images: Array) -> Array:
    """Mirrors each image [B, H, W, C] left to right with probability 1/2."""
    flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def draw_box(
    key: Array, size: int, areas: tuple[float, float], aspects: tuple[float, float], most: int
) -> tuple[Array, Array, Array, Array]:
    """(top, left, height, width) of a random box in an image of size x size.

    The share of the area is uniform in ``areas``, the logarithm of width / height in that of
    ``aspects``. The first of ten draws whose sides are 1 to ``most`` is taken; the whole image if
    there is none.
    """
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area = size**2 * jax.random.uniform(area_key, (_TRIES,), minval=areas[0], maxval=areas[1])
    low, high = jnp.log(jnp.array(aspects))
    aspect = jnp.exp(jax.random.uniform(aspect_key, (_TRIES,), minval=low, maxval=high))
    sides = jnp.round(jnp.sqrt(area * jnp.stack([1 / aspect, aspect]))).astype(jnp.int32)
    fits = ((sides > 0) & (sides <= most)).all(0)
    height, width = jnp.where(fits.any(), sides[:, jnp.argmax(fits)], size)
    top, left = jax.random.randint(place_key, (2,), 0, jnp.array([size - height, size - width]) + 1)
    return top, left, height, width


def crop_weights(start: Array, length: Array, size: int) -> Array:
    """[size, size] weights that resize the pixels start ... start + length - 1 to ``size`` pixels.

    Bilinear, and antialiased where pixels are merged, as PIL and torchvision.
    """
    scale = length / size
    centre = start + (jnp.arange(size)[:, None] + 0.5) * scale
    pixel = jnp.arange(size)
    weight = jnp.maximum(0, 1 - jnp.abs(pixel + 0.5 - centre) / jnp.maximum(scale, 1))
    weight = jnp.where((pixel >= start) & (pixel < start + length), weight, 0)
    return weight / weight.sum(1, keepdims=True)


def random_resized_crop(key: Array, image: Array, least: float = 0.08) -> Array:
    """A random crop of an image [S, S, C], resized back (Szegedy et al., arXiv 1409.4842).

    Its share of the area is at least ``least``, its aspect ratio from 3/4 to 4/3.
    """
    size = image.shape[0]
    top, left, height, width = draw_box(key, size, (least, 1), _ASPECTS, size)
    rows, columns = crop_weights(top, height, size), crop_weights(left, width, size)
    return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns, precision="highest")


def color_jitter(key: Array, image: Array, strength: float = 0.4) -> Array:
    """Brightness, contrast and saturation of an image, in random order: torchvision's ColorJitter.

    Each blends with black, the mean luma or the luma by a factor from 1 - strength to 1 + strength.
    The hue stays.
    """
    order_key, factor_key = jax.random.split(key)
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = jax.random.uniform(factor_key, (3,), minval=low, maxval=high)
    changes = randaugment.brightness, randaugment.contrast, randaugment.saturation

    def apply_one(image: Array, which: Array) -> tuple[Array, None]:
        return jax.lax.switch(which, changes, image, factors[which]), None

    changed, _ = jax.lax.scan(apply_one, image * 255, jax.random.permutation(order_key, 3))
    return changed / 255


def random_erasing(key: Array, image: Array, probability: float = 0.25) -> Array:
    """Replaces a rectangle of an image by uniform random pixels (Zhong et al., arXiv 1708.04896).

    Its share of the area is 0.02 to 1/3, its aspect ratio 0.3 to 3.3, as in timm.
    """
    erase_key, box_key, pixel_key = jax.random.split(key, 3)
    size = image.shape[0]
    areas_aspects = _ERASED, _ERASED_ASPECTS
    top, left, height, width = draw_box(box_key, size, *areas_aspects, size - 1)
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    inside &= jax.random.bernoulli(erase_key, probability) & (height < size)
    pixels = jax.random.uniform(pixel_key, image.shape, image.dtype)
    return jnp.where(inside[..., None], pixels, image)


# name: (function of a key, an image and numbers; each number's name, lowest and highest value)
_KINDS: dict[str, tuple[Callable[..., Array], list[tuple[str, float, float]]]] = {
    "random-resized-crop": (random_resized_crop, [("A", 0.01, 1.0)]),
    "randaugment": (
        randaugment.rand_augment,
        [("N", 1, 20), ("M", 0, randaugment.LEVELS)],
    ),
    "color-jitter": (color_jitter, [("S", 0.0, 1.0)]),
    "random-erasing": (random_erasing, [("P", 0.0, 1.0)]),
}
_FORM = re.compile(r"([a-z-]*[a-z])((?:-[0-9.]+)*)")


def parse(names: str) -> list[Callable[[Array, Array], Array]]:
    """The functions of a key and an image that a comma-separated list names; '': none.

    Raises:
      UserError: an unknown name, or a number that is out of range or of another kind.
    """
    return [_parse_one(name.strip()) for name in names.split(",")] if names else []


def _parse_one(name: str) -> Callable[[Array, Array], Array]:
    match = _FORM.fullmatch(name)
    kind, texts = (match[1], match[2].split("-")[1:]) if match else (name, [])
    if kind not in _KINDS:
        raise UserError(
            f"data.augment names '{name:.80}', which is unknown; use {', '.join(_KINDS)} (nearest: "
            f"{nearest(kind, _KINDS, 1)})"
        )
    function, numbers = _KINDS[kind]
    form = "-".join([kind, *(number[0] for number in numbers)])
    allowed = ", ".join(f"{letter} from {low} to {high}" for letter, low, high in numbers)
    try:
        # A whole number where the limits are.
        values = [type(low)(text) for text, (_, low, _) in zip(texts, numbers, strict=bool(texts))]
    except ValueError:
        values = [math.nan]
    limits = [(low, high) for _, low, high in numbers[: len(values)]]
    if not all(low <= x <= high for x, (low, high) in zip(values, limits, strict=True)):
        raise UserError(f"data.augment names '{name:.80}'; write {kind}, or {form} with {allowed}")
    return lambda key, image: function(key, image, *values)


def check(data: ConfigDict) -> None:
    """Raises UserError for augmentations that are unknown, or exclude each other."""
    parse(data.augment)
    if data.crop_padding and "random-resized-crop" in data.augment:
        raise UserError(
            f"data.augment is '{data.augment:.80}' and data.crop_padding {data.crop_padding}: two "
            "ways to crop; set data.crop_padding=0, or remove random-resized-crop"
        )


def augment(key: Array, images: Array, *, crop_padding: int, flip: bool, names: str = "") -> Array:
    """Augments images [B, H, W, C] in [0, 1].

    crop_padding: 0 turns off padded crops; flip=False flips; names: what follows, see ``parse``.
    """
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        images = random_crop(crop_key, images, crop_padding)
    if flip:
        images = random_flip(flip_key, images)
    for i, function in enumerate(parse(names), start=2):  # 0 and 1 are the keys above
        keys = jax.random.split(jax.random.fold_in(key, i), len(images))
        images = jax.vmap(function)(keys, images)
    return images


def one_hot(labels: Array, num_classes: int, label_smoothing: float = 0.0) -> Array:
    """Targets [B, num_classes] with label smoothing s: (1 - s) * one-hot + s / num_classes."""
    hard = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1 - label_smoothing) * hard + label_smoothing / num_classes
