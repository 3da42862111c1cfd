"""Decoding: resizing as torchvision does, and every colour mode of PIL."""

import numpy as np
import pytest
from PIL import Image

from vit_at.data.sources import decode


def encoded(image, tmp_path, suffix="png"):
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    return path.read_bytes()


def test_resize_is_pils_antialiased_bilinear_squash(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 33, 3), np.uint8)
    image = Image.fromarray(noise)
    decoded = decode(encoded(image, tmp_path), (8, 8, 3))
    expected = image.resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decoded, np.asarray(expected))
    untouched = decode(encoded(Image.fromarray(noise[:, :20]), tmp_path), (20, 20, 3))
    np.testing.assert_array_equal(untouched, noise[:, :20])


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 50, "png", (50, 50, 50)),
        ("LA", (50, 128), "png", (50, 50, 50)),
        ("RGBA", (10, 20, 30, 5), "png", (10, 20, 30)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 55), "jpg", (200, 200, 200)),
        ("I;16", 257 * 99, "png", (99, 99, 99)),
    ],
)
def test_modes(tmp_path, mode, color, suffix, expected):
    content = encoded(Image.new(mode, (8, 8), color), tmp_path, suffix)
    decoded = decode(content, (4, 4, 3))
    np.testing.assert_allclose(decoded.astype(int), np.broadcast_to(expected, (4, 4, 3)), atol=1)
    grey = decode(content, (4, 4, 1))
    assert grey.shape == (4, 4, 1)
    luma = np.dot(expected, (0.299, 0.587, 0.114))
    np.testing.assert_allclose(grey.astype(int), luma, atol=1)


def test_palette_with_transparency(tmp_path, recwarn):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    path = tmp_path / "p.png"
    image.save(path, transparency=b"\x00\x80")
    decoded = decode(path.read_bytes(), (4, 4, 3))
    np.testing.assert_array_equal(decoded, np.broadcast_to((10, 20, 30), (4, 4, 3)))
    assert not recwarn.list


def test_a_cameras_jpeg_of_several_pictures_gives_the_first(tmp_path):
    path = tmp_path / "two.jpg"
    first, second = (Image.new("RGB", (4, 4), (value,) * 3) for value in (200, 50))
    first.save(path, "MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(decode(path.read_bytes(), (4, 4, 3)), 200, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_the_content_decides_the_format_and_not_the_suffix(tmp_path, kind):
    path = tmp_path / "n.png"
    Image.new("RGB", (4, 4), (200, 200, 200)).save(path, kind)
    np.testing.assert_allclose(decode(path.read_bytes(), (4, 4, 3)), 200, atol=2)


def test_eps_bytes_start_no_program(monkeypatch):
    def started(*arguments, **options):
        raise AssertionError(f"{arguments} is started")

    monkeypatch.setattr("subprocess.Popen", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    with pytest.raises(ValueError, match="no PNG, JPEG, WebP or BMP"):
        decode(eps, (8, 8, 3))
