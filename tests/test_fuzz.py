"""Bad input of every kind: it works or ends in a UserError, never in another exception."""

import contextlib
import io
import math
import pathlib
import shutil
import string
import struct

import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from vit_at import main, weights
from vit_at.config import flatten
from vit_at.configs import digits_sgd
from vit_at.data import backends, sources
from vit_at.errors import UserError, one_sentence_errors
from vit_at.models import build
from vit_at.training import objectives

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = list(flatten(digits_sgd.get_config()))
FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def works_or_is_refused(deed) -> bool:
    """Whether it worked; a refusal must be one line, and anything else fails the test."""
    said, refused = io.StringIO(), False
    with contextlib.redirect_stderr(said):
        try:
            with one_sentence_errors():
                deed()
        except SystemExit as ended:
            refused = ended.code == 2
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error:")]
    assert len(lines) == refused
    return not refused


# --- Configurations ---------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, -(2**63), 10**30]),
    st.floats(width=32),
    st.sampled_from([0.0, 1.0, 8 / 255, 8.0, float("nan"), float("inf"), 1e-300]),
)


def fitting(value, number):
    """A value of the same type as a field's, as flags let no other through."""
    if isinstance(value, bool):
        return bool(number == number and number > 1)
    if isinstance(value, int):
        return int(number) if math.isfinite(number) else 0
    if isinstance(value, tuple):
        return (float(number),) * (1 + int(abs(number)) % 4 if math.isfinite(number) else 0)
    if isinstance(value, str):
        return str(number)
    return float(number)


@given(st.dictionaries(st.sampled_from(FIELDS), NUMBERS, min_size=1, max_size=3))
@FUZZ
def test_any_numbers_in_a_configuration(changes):
    config = digits_sgd.get_config("smoke")
    flat = {f: v for f in FIELDS for v in [_get(config, f)]}
    with config.unlocked():
        try:
            config.update_from_flattened_dict(
                {field: fitting(flat[field], number) for field, number in changes.items()}
            )
        except OverflowError:  # of ConfigDict, before any of our code
            return

    def resolve():
        objectives.check(config)
        if config.model.depth < 20 and config.model.embed_dim < 1000:
            build(config, 3, "float32")

    works_or_is_refused(resolve)


def _get(config, field):
    for part in field.split("."):
        config = config[part]
    return config


@given(
    field=st.one_of(st.sampled_from(FIELDS), st.text(string.ascii_lowercase + "._=", max_size=12)),
    value=st.one_of(
        st.text(max_size=8), st.sampled_from(["", "nan", "1e999", "8/0", "(1,", "True", "[]", "-1"])
    ),
)
@FUZZ
def test_any_flag(field, value):
    words = [f"--config={ROOT}/configs/digits_sgd.py", f"--config.{field}={value}"]
    works_or_is_refused(lambda: main.parse(words))


# --- Weight files -----------------------------------------------------------------------------


def _weight_file(suffix: str) -> bytes:
    values = {"a": np.arange(60, dtype=np.float32).reshape(6, 10), "b": np.ones(3, np.float16)}
    if suffix == ".safetensors":
        return safetensors.numpy.save(values)
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    return buffer.getvalue()


WEIGHTS = {suffix: _weight_file(suffix) for suffix in (".safetensors", ".npz")}
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), max_size=4)


def damaged(content: bytes, damage, keep: float) -> bytes:
    """Some bytes overwritten, and only the first ``keep`` of the length left."""
    content = bytearray(content)
    for where, new in damage:
        begin = int(where * len(content))
        content[begin : begin + len(new)] = new
    return bytes(content[: int(keep * len(content))])


@given(suffix=st.sampled_from(list(WEIGHTS)), damage=DAMAGE, keep=st.sampled_from([1.0, 0.7, 0.1]))
@FUZZ
def test_any_damage_to_a_weight_file(tmp_path, suffix, damage, keep):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(damaged(WEIGHTS[suffix], damage, keep))
    works_or_is_refused(lambda: weights.load(path))


# --- Images -----------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    """A small image file."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 20, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    if kind == "cmyk.jpg":
        Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    elif kind == "grey.jpg":
        Image.fromarray(pixels).convert("L").save(buffer, "JPEG")
    elif kind == "16bit.png":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    elif kind == "alpha.png":
        Image.fromarray(pixels).convert("RGBA").save(buffer, "PNG")
    elif kind in ("animated.webp", "animated.png"):
        frames = [Image.fromarray(np.roll(pixels, i, 0)) for i in range(3)]
        suffix = kind.partition(".")[2].upper()
        frames[0].save(buffer, suffix, save_all=True, append_images=frames[1:])
    elif kind == "huge.png":  # claims 60 000 x 60 000 pixels: a decompression bomb
        Image.fromarray(pixels).save(buffer, "PNG")
        content = bytearray(buffer.getvalue())
        content[16:24] = struct.pack(">II", 60_000, 60_000)
        return bytes(content)
    elif kind == "empty.jpg":
        return b""
    else:
        Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}[kind])
    return buffer.getvalue()


KINDS = ["jpg", "png", "bmp", "cmyk.jpg", "grey.jpg", "16bit.png", "alpha.png"]
KINDS += ["animated.webp", "animated.png"]


def folder_config(root, channels=3) -> ConfigDict:
    return ConfigDict(
        {
            "name": f"folder:{root}",
            "dir": "",
            "train_split": "train",
            "test_split": "test",
            "image_size": 8,
            "transform": "squash",
            "stratified": False,
            "mean": (0.5,) * channels,
            "cache_gib": 0.0,
            "decoded_dir": "",
        }
    )


def read_all(root, channels=3):
    examples = sources.load(folder_config(root, channels), "train", threads=1)
    images, labels = examples.read(np.arange(len(examples)))
    assert images.shape == (len(examples), 8, 8, channels)
    return images, labels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_read(tmp_path, kind, channels):
    path = tmp_path / "train" / "a" / f"x.{kind}"
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded(kind))
    images, _ = read_all(tmp_path, channels)
    assert images.std() > 5  # the pixels are noise: neither black nor clipped to white


@pytest.mark.parametrize("kind", ["empty.jpg", "huge.png"])
def test_an_unreadable_image_is_named(tmp_path, kind):
    path = tmp_path / "train" / "a" / f"x.{kind}"
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded(kind))
    with pytest.raises(UserError, match=rf"{path.name} can't be decoded"):
        read_all(tmp_path)


@given(kind=st.sampled_from(KINDS), damage=DAMAGE, keep=st.sampled_from([1.0, 0.9, 0.3]))
@FUZZ
@pytest.mark.filterwarnings("ignore")
def test_any_damage_to_an_image(tmp_path, kind, damage, keep):
    path = tmp_path / "train" / "a" / f"x.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.iterdir():
        old.unlink()
    path.write_bytes(damaged(encoded(kind), damage, keep))
    works_or_is_refused(lambda: read_all(tmp_path))


def test_files_that_are_left_out_are_counted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    for name in ("x.png", "notes.txt", "y.gif", ".hidden.png"):
        path = tmp_path / "train" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("png"))
    assert len(read_all(tmp_path)[0]) == 1
    (line,) = said
    assert "3 files of" in line
    assert "left out" in line


# --- Data shards ------------------------------------------------------------------------------

SHARD = "digits-test.array_record-00000-of-00001"


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(FUZZ, max_examples=25)
def test_a_flipped_bit_of_a_data_shard_is_detected_or_harmless(tmp_path, where, bit):
    copy = tmp_path / "copied" / "1.0.0"
    if not copy.exists():
        shutil.copytree(backends.PACKAGED / "digits" / "1.0.0", copy)
    original = (backends.PACKAGED / "digits" / "1.0.0" / SHARD).read_bytes()
    content = bytearray(original)
    content[int(where * len(content))] ^= 1 << bit
    (copy / SHARD).write_bytes(content)
    config = folder_config(tmp_path, 1)
    config.update(name="copied", dir=str(tmp_path), cache_gib=1.0)
    truth = sources.load(ConfigDict({**config, "name": "digits"}), "test")
    rows = np.arange(len(truth))
    read = []

    def load():
        read.append(sources.load(config, "test", threads=1).read(rows))

    if works_or_is_refused(load):
        for ours, wanted in zip(read[0], truth.read(rows), strict=True):
            np.testing.assert_array_equal(ours, wanted)
