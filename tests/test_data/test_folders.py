"""Folders of images: labels, slices, links and error sentences."""

import shutil

import data_sets
import numpy as np
import pytest
import runs
from PIL import Image

from vit_at.data import backends, cache, sources
from vit_at.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """train: a (30 images of value 0..29), b (10 of 100..109); test: b only."""
    for i in range(30):
        data_sets.write_image(tmp_path / f"train/a/{i:02}.png", color=i)
    for i in range(10):
        data_sets.write_image(tmp_path / f"train/b/{i:02}.png", color=100 + i)
    data_sets.write_image(tmp_path / "test/b/x.PNG", color=7)
    (tmp_path / "test/b/notes.txt").write_text("not an image")
    return tmp_path


def test_folder_labels_pixels_and_indices(folder):
    train = sources.load(data_sets.config(f"folder:{folder}"), "train")
    images, labels = train.read(np.arange(40))
    assert train.class_names == ("a", "b")
    np.testing.assert_array_equal(np.sort(train.indices), np.arange(40))
    values = np.r_[np.arange(30), np.arange(100, 110)]  # by position in the sorted listing
    np.testing.assert_array_equal(images[:, 0, 0, 0], values[train.indices])
    np.testing.assert_array_equal(labels, train.indices >= 30)


@pytest.mark.parametrize("cached", [0, 4])
def test_the_contents_of_a_folder_are_known_by_classes_names_and_sizes(
    folder, tmp_path_factory, cached
):
    """Those of a copy, and of a part, are equal; a label that was corrected makes them others."""

    def contents(place, count=0):
        config = data_sets.config(f"folder:{place}", cache_gib=cached)
        return sources.load(config, "train", count=count).contents

    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    before = contents(folder)
    assert contents(copy) == before
    assert contents(folder, count=5) == before != ""
    (folder / "train/a/03.png").rename(folder / "train/b/3.png")
    assert contents(folder) != before
    assert runs.examples(5).contents == ""


def test_the_contents_of_an_array_are_its_pixels(tmp_path):
    """A corruption that is computed again has the same size and labels."""

    def contents(split, **changes):
        pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8)
        pixels[7] = changes.get("pixel", 0)
        np.save(tmp_path / "noise.npy", pixels)
        np.save(tmp_path / "labels.npy", np.arange(10) % changes.get("classes", 3))
        return sources.load(data_sets.config(f"npy:{tmp_path / 'noise.npy'}"), split).contents

    before = contents("test")
    assert contents("test") == before
    assert contents("test", pixel=1) != before
    assert contents("test", classes=4) != before
    assert contents("test[:5]") == contents("test[:5]", pixel=1)


def test_a_version_stored_in_another_format_is_another_set(tmp_path):
    """TFDS says the size of each split: CIFAR-10 of JPEG files is not that of PNG files."""
    found = [backends.open_tfds("digits", "", "test")]
    for name, size in (("copy", "57301"), ("other", "57302")):
        shutil.copytree(backends.PACKAGED / "digits", tmp_path / name)
        info = next((tmp_path / name).rglob("dataset_info.json"))
        assert "57301" in info.read_text()
        info.write_text(info.read_text().replace("57301", size))
        found.append(backends.open_tfds(name, str(tmp_path), "test"))
    assert found[0].contents() == found[1].contents() != found[2].contents()
    assert found[1].fingerprint() != found[2].fingerprint()


def test_a_relative_folder_begins_in_the_data_directory(folder):
    config = data_sets.config(f"folder:{folder.name}", dir=str(folder.parent))
    assert len(sources.load(config, "train")) == 40
    with pytest.raises(UserError, match=r"give the directory that holds it as data\.dir"):
        sources.load(data_sets.config(f"folder:{folder.name}"), "train")


def test_a_class_that_a_split_lacks_does_not_shift_its_labels(folder):
    test = sources.load(data_sets.config(f"folder:{folder}", cache_gib=0), "test")
    images, labels = test.read(np.array([0]))
    assert len(test) == 1
    assert labels.tolist() == [1]
    assert images[0, 0, 0, 0] == 7


def test_folders_of_splits_that_are_not_used_add_no_classes(folder):
    """Such as test/unknown, as Kaggle's archives have it."""
    data_sets.write_image(folder / "test/B/x.png")
    for name in ("a", "b"):
        data_sets.write_image(folder / f"val/{name}/x.png")
    config = data_sets.config(f"folder:{folder}", test_split="val[:50%]+val[50%:]")
    train, val, test = (sources.load(config, split) for split in ("train", "val", "test"))
    sources.check_splits(config, train, val)
    assert train.class_names == val.class_names == ("a", "b")
    np.testing.assert_array_equal(train.read(np.arange(40))[1], train.indices >= 30)
    assert test.class_names == ("B", "a", "b")  # now this split is used, too


def test_splits_of_other_classes_are_named(folder):
    config = data_sets.config(f"folder:{folder}")
    train, test = (sources.load(config, split) for split in ("train", "test"))
    with pytest.raises(UserError, match=r"only one of data.train_split 'train' .* the classes a;"):
        sources.check_splits(config, train, test)


def test_folder_slices_mix_the_classes_and_partition(folder):
    config = data_sets.config(f"folder:{folder}")
    first, rest = (sources.load(config, f"train[{s}]") for s in (":50%", "50%:"))
    assert set(first.read(np.arange(20))[1]) == {0, 1}
    assert sorted([*first.indices, *rest.indices]) == list(range(40))


def test_folder_errors(folder):
    config = data_sets.config(f"folder:{folder}", cache_gib=0)
    with pytest.raises(UserError, match="folder:/nowhere', which is no directory"):
        sources.load(data_sets.config("folder:/nowhere"), "train")
    with pytest.raises(UserError, match=r"split 'val'; it has test \(1\), train \(40\)"):
        sources.load(config, "val")
    broken = folder / "test/b/broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    examples = sources.load(config, "test")
    with pytest.raises(UserError, match=r"test/b/broken\.jpg can't be decoded"):
        examples.read(np.arange(2))
    with pytest.raises(UserError, match=r"broken\.jpg"):  # through the threads too
        cache.in_memory(examples, 2)
    broken.unlink()
    with pytest.raises(UserError, match=r"can't be read .*broken\.jpg"):
        examples.read(np.arange(2))
    cut = folder / "train/a/cut.jpg"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.jpg can't be decoded .*truncated"):
        sources.load(data_sets.config(f"folder:{folder}"), "train")
    (folder / "train/c").mkdir()
    with pytest.raises(UserError, match=r"train/c has no images \(\.jpg"):
        sources.load(config, "train")


def test_links_to_files_and_folders_are_followed(folder):
    (folder / "test/b/y.png").symlink_to(folder / "train/a/03.png")
    (folder / "val").symlink_to(folder / "test")
    examples = sources.load(data_sets.config(f"folder:{folder}"), "val")
    assert sorted(examples.read(np.arange(2))[0][:, 0, 0, 0]) == [3, 7]


def test_folder_without_classes(tmp_path):
    data_sets.write_image(tmp_path / "0.png")
    with pytest.raises(UserError, match="has no classes; arrange it as"):
        sources.load(data_sets.config(f"folder:{tmp_path}"), "train")
