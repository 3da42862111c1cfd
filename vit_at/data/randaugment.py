"""RandAugment on the device (Cubuk et al., arXiv 1909.13719), as torchvision has it.

Each image gets n operations in a row, drawn from OPERATIONS with equal probability, at magnitude m
of 30; an operation with a direction goes either way. Images are rounded to 256 levels and stay on
them, as in torchvision, whose arithmetic on uint8 tensors this follows (interpolation: nearest;
outside the image: black). dm-pix is not used: its brightness, contrast and saturation are defined
otherwise, and it lacks equalise, posterise, autocontrast and sharpness.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
LEVELS = 30  # magnitudes are 0 to 30
_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601


def grey(image: Array) -> Array:
    """Luma [..., 1] of an image [..., C]; a grey image is returned as it is."""
    return image if image.shape[-1] == 1 else (image * jnp.array(_GREY)).sum(-1, keepdims=True)


def blend(image: Array, other: Array, factor: Array) -> Array:
    """factor * image + (1 - factor) * other, clipped to 0 to 255; factor 1 changes nothing."""
    return jnp.clip(factor * image + (1 - factor) * other, 0, 255)


def brightness(image: Array, factor: Array) -> Array:
    """Blends an image [H, W, C] of values 0 to 255 with black."""
    return blend(image, jnp.zeros_like(image), factor)


def contrast(image: Array, factor: Array) -> Array:
    """Blends an image with its mean luma."""
    return blend(image, grey(image).mean(), factor)


def saturation(image: Array, factor: Array) -> Array:
    """Blends an image with its luma."""
    return blend(image, grey(image), factor)


def sharpness(image: Array, factor: Array) -> Array:
    """Blends the inside of an image with its 3 x 3 mean, in which the centre weighs 5 of 13."""
    h, w, _ = image.shape
    window = sum(image[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3))
    inside = jnp.round((window + 4 * image[1:-1, 1:-1]) / 13)
    return blend(image, image.at[1:-1, 1:-1].set(inside), factor)


def posterise(image: Array, bits: Array) -> Array:
    """Keeps the highest bits of 8."""
    step = 2.0 ** (8 - bits)
    return jnp.floor(image / step) * step


def solarise(image: Array, threshold: Array) -> Array:
    """Inverts the values from the threshold up."""
    return jnp.where(image >= threshold, 255 - image, image)


def autocontrast(image: Array) -> Array:
    """Stretches each channel to 0 to 255; a constant one stays."""
    low, high = image.min((0, 1)), image.max((0, 1))
    scale = 255 / jnp.where(high > low, high - low, 255)
    return jnp.clip((image - jnp.where(high > low, low, 0)) * scale, 0, 255)


def equalise(image: Array) -> Array:
    """Gives each channel a flat histogram; values are whole numbers."""

    def of_channel(values: Array) -> Array:
        values = values.astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[values].add(1)
        step = (values.size - counts[values.max()]) // 255  # without those of the largest value
        below = jnp.cumsum(counts) - counts
        table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step == 0, values, table[values])

    return jax.vmap(of_channel, 2, 2)(image).astype(image.dtype)


def warp(image: Array, matrix: Array, shift: Array) -> Array:
    """Pixel p = (x, y) from the centre becomes that at matrix @ p + shift; outside: black."""
    h, w, _ = image.shape
    y, x = jnp.mgrid[:h, :w]
    place = jnp.stack([x - (w - 1) / 2, y - (h - 1) / 2], -1)
    centre = jnp.array([(w - 1) / 2, (h - 1) / 2])
    source = jnp.einsum("ij,hwj->hwi", matrix, place, precision="highest") + shift + centre
    column, row = jnp.moveaxis(jnp.round(source).astype(jnp.int32), -1, 0)
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    return jnp.where(inside[..., None], image[row.clip(0, h - 1), column.clip(0, w - 1)], 0)


def _shear_x(image: Array, m: Array) -> Array:  # m as a tangent; about the top left corner
    return warp(image, jnp.array([[1, m], [0, 1]]), jnp.array([m * image.shape[0] / 2, 0]))


def _shear_y(image: Array, m: Array) -> Array:
    return warp(image, jnp.array([[1, 0], [m, 1]]), jnp.array([0, m * image.shape[1] / 2]))


def _translate_x(image: Array, m: Array) -> Array:
    return warp(image, jnp.eye(2), jnp.array([-jnp.trunc(m * image.shape[1]), 0]))


def _translate_y(image: Array, m: Array) -> Array:
    return warp(image, jnp.eye(2), jnp.array([0, -jnp.trunc(m * image.shape[0])]))


def _rotate(image: Array, degrees: Array) -> Array:
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    return warp(image, jnp.array([[cos, -sin], [sin, cos]]), jnp.zeros(2))


# name: (function of the image and its amount, amount at magnitude 30, whether it has a direction)
OPERATIONS: dict[str, tuple[Callable[[Array, Array], Array], float, bool]] = {
    "Identity": (lambda image, _: image, 0.0, False),
    "ShearX": (_shear_x, 0.3, True),
    "ShearY": (_shear_y, 0.3, True),
    "TranslateX": (_translate_x, 150 / 331, True),
    "TranslateY": (_translate_y, 150 / 331, True),
    "Rotate": (_rotate, 30.0, True),
    "Brightness": (lambda image, m: brightness(image, 1 + m), 0.9, True),
    "Color": (lambda image, m: saturation(image, 1 + m), 0.9, True),
    "Contrast": (lambda image, m: contrast(image, 1 + m), 0.9, True),
    "Sharpness": (lambda image, m: sharpness(image, 1 + m), 0.9, True),
    "Posterize": (lambda image, m: posterise(image, 8 - jnp.round(m)), 4.0, False),
    "Solarize": (lambda image, m: solarise(image, 255 - m), 255.0, False),
    "AutoContrast": (lambda image, _: autocontrast(image), 0.0, False),
    "Equalize": (lambda image, _: equalise(image), 0.0, False),
}


def rand_augment(key: Array, image: Array, n: int = 2, magnitude: int = 9) -> Array:
    """RandAugment of one image [H, W, C] in [0, 1]: n operations at a magnitude of 0 to 30."""
    functions, most, directed = zip(*OPERATIONS.values(), strict=True)
    amounts, signs = jnp.array(most) * (magnitude / LEVELS), jnp.array(directed)

    def apply_one(image: Array, key: Array) -> tuple[Array, None]:
        which_key, sign_key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, len(functions))
        flipped = signs[which] & jax.random.bernoulli(sign_key)
        amount = jnp.where(flipped, -1, 1) * amounts[which]
        changed = jax.lax.switch(which, functions, image, amount)
        return jnp.floor(changed + 1e-3), None  # whole values may come out just below

    levels, _ = jax.lax.scan(apply_one, jnp.round(image * 255), jax.random.split(key, n))
    return levels / 255
