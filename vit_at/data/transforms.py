"""Decoding on the host: from an encoded image file to pixels of one size.

An image is converted to the wanted channels and then squashed to a square by PIL's antialiased
bilinear filter. torchvision's ``Resize((S, S))`` does the same to a PIL image.
"""

import io

import numpy as np
from PIL import Image


def decode(encoded: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an image file to uint8 [S, S, C], C being 1 (grey) or 3 (colour)."""
    size, _, channels = image_shape
    with Image.open(io.BytesIO(encoded)) as opened:
        image = _convert(opened, {1: "L", 3: "RGB"}[channels])
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_shape)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip at 255 instead of scaling
        values = np.clip(np.asarray(image), 0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # direct conversion warns
    return image.convert(mode)
