"""Transforms by name: torchvision's pixels to the last bit, or recorded ones without it."""

import numpy as np
import pytest
from PIL import Image

from vit_at.data import transforms
from vit_at.errors import UserError

# What torchvision 0.29 makes of pixel (x, y) = x**2 + 29 * y, 9 x 7 pixels.
RECORDED = {
    "resize6-crop4": [
        [45, 54, 67, 81],
        [78, 87, 100, 114],
        [110, 119, 132, 146],
        [143, 152, 165, 179],
    ],
    "resize6-crop4-bicubic": [
        [43, 52, 64, 79],
        [77, 86, 98, 113],
        [111, 120, 132, 147],
        [145, 154, 166, 181],
    ],
    "squash": [[16, 24, 42, 67], [61, 69, 87, 112], [115, 123, 141, 166], [160, 168, 186, 211]],
}
SIZES = [(320, 240), (240, 320), (300, 257), (500, 256), (256, 256), (40, 31), (1, 60)]


def photograph(width, height, mode="RGB"):
    """Noise that is smooth at some scales, as photographs are."""
    rng = np.random.default_rng(width * height)
    small = rng.integers(0, 256, (max(2, height // 7), max(2, width // 7), 3), np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.LANCZOS))
    noisy = image.astype(int) + rng.integers(-20, 20, image.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resize256-crop224", "resize248-crop224-bicubic", "squash"])
def test_a_transform_is_torchvisions(name, size):
    tv = pytest.importorskip("torchvision.transforms")
    image = photograph(*size, mode="L" if size == SIZES[0] else "RGB")
    mode = tv.InterpolationMode.BICUBIC if "bicubic" in name else tv.InterpolationMode.BILINEAR
    if name == "squash":
        theirs = tv.Resize((224, 224))
    else:
        theirs = tv.Compose([tv.Resize(int(name[6:9]), mode), tv.CenterCrop(224)])
    ours = transforms.parse(name, 224)(image, 224)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs(image)))


def test_timms_crop_pct_is_a_name():
    timm = pytest.importorskip("timm.data")
    image, options = photograph(320, 211), {"interpolation": "bicubic", "crop_pct": 0.9}
    theirs = timm.create_transform((3, 224, 224), **options).transforms[:2]
    ours = transforms.parse("resize248-crop224-bicubic", 224)(image, 224)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs[1](theirs[0](image))))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_pixels(name):
    image = Image.fromarray(np.add.outer(np.arange(7) * 29, np.arange(9) ** 2).astype(np.uint8))
    assert np.asarray(transforms.parse(name, 4)(image, 4)).tolist() == RECORDED[name]


def test_an_image_of_the_right_size_is_only_cropped():
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    cropped = transforms.parse("resize6-crop4", 4)(Image.fromarray(pixels), 4)
    np.testing.assert_array_equal(np.asarray(cropped), pixels[1:5, 2:6])


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match="1 x 101 pixels"):
        transforms.parse("resize6-crop4", 4)(Image.new("L", (1, 101)), 4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resize", "unknown"),
        ("resize256-crop224-lanczos", "unknown"),
        ("resize0-crop4", "unknown"),
        ("resize4-crop5", "crop at most 4"),
        ("resize256-crop224", "224-pixel images, but data.image_size .* is 4"),
    ],
)
def test_a_bad_name_is_one_sentence(name, says):
    with pytest.raises(UserError, match=says):
        transforms.parse(name, 4)
