"""Decoded copies on disk: the same images, written once and whole, and refusals."""

import collections
import errno
import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import data_sets
import numpy as np
import pytest

from vit_at.data import cache, sources
from vit_at.errors import UserError

STREAMED = data_sets.config(image_size=12, mean=(0, 0, 0), cache_gib=0)


def load(directory, split="test[:300]", **fields):
    fields = {"image_size": 12, "mean": (0, 0, 0), "cache_gib": 0} | fields
    return sources.load(data_sets.config(decoded_dir=str(directory), **fields), split, threads=2)


def copies(directory):
    return [path for path in directory.iterdir() if not path.name.startswith(".")]


def test_a_copy_holds_the_same_images_and_is_written_once(tmp_path, monkeypatch):
    streamed, rows = sources.load(STREAMED, "test[:300]"), np.array([299, 0, 3, 3])
    expected, written = streamed.read(rows), load(tmp_path / "copies")
    monkeypatch.setattr(sources, "decode", None)  # from here on, nothing is decoded
    for copied in (written, load(tmp_path / "copies")):
        for a, b in zip(copied.read(rows), expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert copied.name == streamed.name
    assert [path.name[:6] for path in copies(tmp_path / "copies")] == ["digits"]


def test_other_images_are_another_copy(tmp_path):
    load(tmp_path)
    for other in ({"image_size": 8}, {"split": "test[:299]"}, {"transform": "resize14-crop12"}):
        before = len(copies(tmp_path))
        load(tmp_path, **other)
        assert len(copies(tmp_path)) == before + 1


def test_of_a_folder_whose_files_change_another_copy_is_made(tmp_path):
    for number in range(4):
        data_sets.write_image(tmp_path / f"images/test/a/{number}.png", color=number)
    names = {"name": f"folder:{tmp_path}/images", "split": "test"}
    same = [load(tmp_path / "copies", **names).read(np.arange(4)) for _ in range(2)]
    np.testing.assert_array_equal(*(images for images, _ in same))
    assert len(copies(tmp_path / "copies")) == 1
    data_sets.write_image(tmp_path / "images/test/a/2.png", color=77)
    changed, _ = load(tmp_path / "copies", **names).read(np.arange(4))
    assert sorted(changed[:, 0, 0, 0]) == [0, 1, 3, 77]
    assert len(copies(tmp_path / "copies")) == 2


def test_other_classes_of_a_folder_are_another_copy(tmp_path):
    for name in ("train/a", "train/b", "test/b"):
        data_sets.write_image(tmp_path / f"images/{name}/0.png")
    names = {"name": f"folder:{tmp_path}/images", "split": "test"}
    for train, label in (("train", 1), ("test", 0)):
        copied = load(tmp_path / "copies", train_split=train, **names)
        assert copied.labels().tolist() == [label]


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_who_may_read_a_copy_is_said_by_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        load(tmp_path)
    finally:
        os.umask(before)
    (copy,) = copies(tmp_path)
    assert copy.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in copy.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("letter", ["a", "ä"])  # one byte, and two
def test_the_copy_of_a_folder_with_a_long_path_has_a_name_that_fits(letter, tmp_path):
    for length in (90, 91):
        folder = tmp_path.joinpath("i", *[letter * length] * 3)
        data_sets.write_image(folder / "test/a/0.png", color=length)
        copied = load(tmp_path / "copies", name=f"folder:{folder}", split="test")
        assert copied.read(np.array([0]))[0][0, 0, 0, 0] == length
    assert len(copies(tmp_path / "copies")) == 2


def test_an_interrupted_copy_leaves_nothing(tmp_path, monkeypatch):
    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "decode", fails)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert not copies(tmp_path)
    assert not list(tmp_path.glob(".part-*"))


def test_of_two_that_start_at_once_one_decodes(tmp_path, monkeypatch):
    decoded, decode = [], sources.decode

    def counted(*arguments):
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(sources, "decode", counted)
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(load, [tmp_path, tmp_path])
    assert len(decoded) == 300
    for a, b in zip(one.read(np.arange(300)), other.read(np.arange(300)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_killed_process_left_is_removed(tmp_path):
    load(tmp_path)
    (copy,) = copies(tmp_path)
    shutil.rmtree(copy)
    mine, others = (tmp_path / f".part-{digest}-x" for digest in (copy.name[-12:], "other"))
    mine.mkdir(), others.mkdir()
    load(tmp_path)
    assert not mine.exists()
    assert others.exists()  # of another copy, which may be being written


def test_a_disk_that_fills_is_one_sentence(tmp_path, monkeypatch):
    """Writing to mapped memory that the disk has no room for would end the process."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"can't be written \(.*No space left.*; choose another"):
        load(tmp_path)
    assert not list(tmp_path.glob(".part-*"))


def test_without_locks_the_first_of_two_processes_wins(tmp_path, monkeypatch):
    """The other one, which decoded too, reads the first one's copy."""

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    original, decode = load(tmp_path / "elsewhere"), sources.decode
    (copy,) = copies(tmp_path / "elsewhere")

    def while_another_writes(*arguments):
        shutil.copytree(copy, tmp_path / "copies" / copy.name, dirs_exist_ok=True)
        return decode(*arguments)

    monkeypatch.setattr(sources, "decode", while_another_writes)
    both = load(tmp_path / "copies").read(np.arange(300)), original.read(np.arange(300))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    assert [path.name for path in copies(tmp_path / "copies")] == [copy.name]


def test_what_cannot_be_copied_is_one_sentence(tmp_path, monkeypatch):
    load(tmp_path)
    (copy,) = copies(tmp_path)
    (copy / cache.IMAGES).write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"can't be read .*; remove the directory"):
        load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't be written .*; choose another"):
        load(tmp_path / "file")
    usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1))
    with pytest.raises(UserError, match=r"0\.0 GiB free, but the copy of .* needs 0\.0; choose"):
        load(tmp_path / "small")
