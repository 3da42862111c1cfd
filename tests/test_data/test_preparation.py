"""Preparing data: conversion keeps every byte, and every failure is one sentence with status 2."""

import errno
import importlib.util
import json
import pathlib
import shutil
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict

from vit_at import prepare
from vit_at.data import backends, preparation, sources
from vit_at.errors import UserError

DIGITS = backends.PACKAGED / "digits" / "1.0.0"


def data_config(name, directory="") -> ConfigDict:
    fields = {"image_size": 8, "mean": (0.5,), "cache_gib": 1.0}
    fields |= {"transform": "squash", "stratified": False}
    return ConfigDict({"name": name, "dir": str(directory), **fields})


def status_of(*arguments) -> int:
    """The exit status of the command where it refuses."""
    with pytest.raises(SystemExit) as ended:
        prepare.main(arguments)
    return ended.value.code


@pytest.fixture
def tfrecords(tmp_path):
    """The digits in tfrecord format, as an older TFDS would have prepared them."""
    target = tmp_path / "copied" / "1.0.0"
    shutil.copytree(DIGITS, target, ignore=shutil.ignore_patterns("*.array_record*"))
    info = target / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    builder = tfds.builder_from_directory(DIGITS)
    for split in ("train", "test"):
        raw = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        with (target / f"digits-{split}.tfrecord-00000-of-00001").open("wb") as file:
            for record in raw:
                file.write(struct.pack("<Q", len(record)) + b"head" + record + b"body")
    return tmp_path


def test_conversion_gives_the_same_examples(tfrecords):
    with pytest.raises(UserError, match="stored as tfrecord"):
        sources.load(data_config("copied", tfrecords), "train")
    assert prepare.main(["copied", f"--data_dir={tfrecords}"]) == 0
    for split in ("train", "test"):
        converted = sources.load(data_config("copied", tfrecords), split)
        packaged = sources.load(data_config("digits"), split)
        rows = np.arange(len(packaged))
        for a, b in zip(converted.read(rows), packaged.read(rows), strict=True):
            np.testing.assert_array_equal(a, b)
    info = (tfrecords / "copied/1.0.0/dataset_info.json").read_text()
    assert json.loads(info)["alternativeFileFormats"] == ["array_record"]
    prepare.prepare("copied", str(tfrecords))  # a second time changes nothing
    assert (tfrecords / "copied/1.0.0/dataset_info.json").read_text() == info


@pytest.mark.parametrize(
    ("keep", "message"),
    [(-3, "ends in the middle of a record"), (5, "ends in the middle"), (0, "has 0 records, not")],
)
def test_a_damaged_file_leaves_the_set_unconverted(tfrecords, keep, message):
    path = tfrecords / "copied/1.0.0/digits-test.tfrecord-00000-of-00001"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=message):
        prepare.prepare("copied", str(tfrecords))
    with pytest.raises(UserError, match="stored as tfrecord"):
        sources.load(data_config("copied", tfrecords), "train")


def test_a_disk_that_fills_under_the_description_leaves_it(tfrecords, monkeypatch):
    info = tfrecords / "copied/1.0.0/dataset_info.json"
    before = info.read_text()

    def cut(path, text):
        pathlib.Path(path).write_bytes(text[:20].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(info)), "write_text", cut)
    with pytest.raises(OSError, match="No space left"):
        preparation.convert(epath.Path(info.parent))
    assert info.read_text() == before


def test_other_formats_are_refused(tfrecords):
    info = tfrecords / "copied/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    with pytest.raises(UserError, match="is stored as riegeli, not as tfrecord"):
        prepare.prepare("copied", str(tfrecords))


def test_what_is_ready_is_left_alone(tmp_path, capsys):
    assert prepare.main(["digits", f"--data_dir={tmp_path}"]) == 0
    assert str(DIGITS) in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_missing_tensorflow_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert status_of("cifar100", f"--data_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert "pip install 'vit_at[prepare]'" in error
    assert error.count("\n") == 1


def test_unknown_name(tmp_path, capsys):
    assert status_of("cifar1000", f"--data_dir={tmp_path}") == 2
    assert "nearest: cifar100" in capsys.readouterr().err


class FakeBuilder:
    """Stands in for TFDS: records how it was asked, and fails if told to."""

    data_path = "there"

    def __init__(self, error=None):
        self.error, self.asked = error, {}

    def __call__(self, name, **options):
        self.asked = {"name": name, **options}
        return self

    def download_and_prepare(self, download_config):
        self.asked["manual_dir"] = download_config.manual_dir
        if self.error:
            raise self.error


@pytest.fixture
def with_tensorflow(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)


@pytest.mark.usefixtures("with_tensorflow")
def test_download_asks_for_array_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "builder", fake := FakeBuilder())
    assert prepare.prepare("imagenette/320px-v2", str(tmp_path), "/archives") == "there"
    assert fake.asked == {
        "name": "imagenette/320px-v2",
        "data_dir": backends.epath.Path(tmp_path),
        "file_format": "array_record",
        "manual_dir": "/archives",
    }


@pytest.mark.usefixtures("with_tensorflow")
@pytest.mark.parametrize(
    "error", [ConnectionError("Max retries\n exceeded"), AssertionError("Manual\n directory")]
)
def test_a_failing_download_is_one_sentence(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(tfds, "builder", FakeBuilder(error))
    assert status_of("cifar100", f"--data_dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert "cifar100 could not be prepared in" in message
    assert message.endswith(" ".join(str(error).split()) + "\n")
    assert message.count("\n") == 1


def test_help_and_imports(capsys):
    with pytest.raises(SystemExit) as exit_status:
        prepare.main(["--help"])
    assert exit_status.value.code == 0
    assert "vit-at prepare cifar10" in capsys.readouterr().out
    assert "tensorflow" not in sys.modules
