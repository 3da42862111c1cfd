"""From an image file's pixels to the square that a model sees, by name.

squash                        resized to S x S, whatever its shape: as the paper's code
resizeN-cropM[-bicubic]       the shorter side resized to N, then the central M x M cropped, as in
                              resize256-crop224: ImageNet's usual protocol, and RobustBench's

Both filters, bilinear and bicubic, are PIL's, which are antialiased. A name gives the pixels of
torchvision's ``Resize`` and ``CenterCrop`` on PIL images, to the last bit. timm's ``crop_pct`` is
the same with N = floor(M / crop_pct): resize248-crop224-bicubic is 0.9.
"""

import functools
import re
from collections.abc import Callable

from PIL import Image

from vit_at.errors import UserError

Transform = Callable[[Image.Image, int], Image.Image]  # (image, size) -> size x size

_LONGEST = 100  # times the shorter side
_FORM = re.compile(r"resize([1-9]\d{0,3})-crop([1-9]\d{0,3})(-bicubic)?")


def squash(image: Image.Image, size: int) -> Image.Image:
    """Resizes to a square by the bilinear filter: torchvision's ``Resize((size, size))``."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BILINEAR)


def resize_and_crop(
    image: Image.Image, size: int, *, shorter: int, resampling: Image.Resampling
) -> Image.Image:
    """torchvision's ``Resize(shorter)`` and ``CenterCrop(size)``; size is at most shorter."""
    short = min(image.size)
    if max(image.size) > _LONGEST * short:  # it would take gigabytes
        raise ValueError("its sides of {} x {} pixels are too unequal to crop".format(*image.size))
    width, height = (int(shorter * side / short) for side in image.size)  # truncated, as there
    if (width, height) != image.size:
        image = image.resize((width, height), resampling)
    left, top = round((width - size) / 2), round((height - size) / 2)  # halves to even, as there
    return image.crop((left, top, left + size, top + size))


def parse(name: str, size: int) -> Transform:
    """The transform of a name, for images of size x size.

    Raises:
      UserError: an unknown form, a crop that is larger than the resized image, or that is not size.
    """
    if name == "squash":
        return squash
    match = _FORM.fullmatch(name)
    if not match:
        raise UserError(
            f"data.transform (--transform) is '{name:.80}', which is unknown; write squash, "
            "resize256-crop224, resize256-crop224-bicubic, or these with other sizes"
        )
    shorter, crop = int(match[1]), int(match[2])
    if crop > shorter:
        raise UserError(
            f"data.transform (--transform) is '{name}', which crops {crop} pixels of {shorter}; "
            f"crop at most {shorter}"
        )
    if crop != size:
        raise UserError(
            f"data.transform (--transform) is '{name}', which gives {crop}-pixel images, but "
            f"data.image_size (--image_size) is {size}; make them equal"
        )
    resampling = Image.Resampling.BICUBIC if match[3] else Image.Resampling.BILINEAR
    return functools.partial(resize_and_crop, shorter=shorter, resampling=resampling)
