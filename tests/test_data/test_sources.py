"""Reading images: TFDS, folders and digits give the right pixels, labels and error sentences."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from vit_at.data import backends, cache, sources
from vit_at.data.examples import Examples
from vit_at.errors import UserError

DIGITS = backends.PACKAGED / "digits" / "1.0.0"
DIGITS_SHA256 = "6c5bf357dcf4e2941347db518b991789d1dc0b1e3181b078659b42c42b040585"


def data_config(name="digits", **fields) -> ConfigDict:
    defaults = {"dir": "", "image_size": 8, "mean": (0.5,), "cache_gib": 4.0, "decoded_dir": ""}
    defaults |= {"allow_overlap": False, "transform": "squash", "stratified": False}
    return ConfigDict({"name": name, **defaults, **fields})


def write_image(path, size=(8, 8), color=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """train: a (30 images of value 0..29), b (10 of 100..109); test: b only."""
    for i in range(30):
        write_image(tmp_path / f"train/a/{i:02}.png", color=i)
    for i in range(10):
        write_image(tmp_path / f"train/b/{i:02}.png", color=100 + i)
    write_image(tmp_path / "test/b/x.PNG", color=7)
    (tmp_path / "test/b/notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture
def prepared(tmp_path):
    """A TFDS directory with a copy of the digits under the name 'copied'."""
    shutil.copytree(DIGITS, tmp_path / "copied" / "1.0.0")
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_all_there():
    train, test = (sources.load(data_config(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    assert train.name == "digits/1.0.0 train"
    assert train.class_names == tuple("0123456789")
    assert train.image_shape == (8, 8, 1)
    assert train.nbytes == 1438 * 64
    digest = hashlib.sha256()
    for examples in (train, test):
        images, labels = examples.read(np.arange(len(examples)))
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        digest.update(images.tobytes() + labels.tobytes())
    assert digest.hexdigest() == DIGITS_SHA256


def test_digits_are_those_of_scikit_learn():
    original = pytest.importorskip("sklearn.datasets").load_digits()
    expected = np.round(original.images * 255 / 16).astype(np.uint8)[..., None]
    in_test = np.arange(1797) % 5 == 4
    for split, rows in (("train", ~in_test), ("test", in_test)):
        examples = sources.load(data_config(), split)
        images, labels = examples.read(np.arange(len(examples)))
        np.testing.assert_array_equal(images, expected[rows])
        np.testing.assert_array_equal(labels, original.target[rows])


def test_no_tensorflow_is_imported():
    code = (
        "import sys; from ml_collections import ConfigDict; from vit_at.data import sources;"
        "d = ConfigDict(dict(name='digits', dir='', image_size=8, mean=(0.5,), cache_gib=1.0,"
        "decoded_dir='', transform='squash', stratified=False));"
        "sources.load(d, 'train'); assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "OpenCV" not in done.stderr


# --- Examples ---------------------------------------------------------------------------------


def test_cached_reads_equal_streamed_reads():
    streamed = sources.load(data_config(image_size=12, mean=(0, 0, 0), cache_gib=0), "train[:600]")
    loaded = sources.load(data_config(image_size=12, mean=(0, 0, 0)), "train[:600]")
    for threads in (1, 3):
        held = cache.in_memory(streamed, threads)
        rows = np.array([599, 0, 3, 3])
        for a, b, c in zip(streamed.read(rows), held.read(rows), loaded.read(rows), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def test_only_small_sets_are_cached(monkeypatch):
    calls = []
    monkeypatch.setattr(cache, "in_memory", lambda examples, threads: calls.append(threads))
    sources.load(data_config(cache_gib=359 * 64 / 2**30), "test", threads=3)
    assert calls == [3]
    assert sources.load(data_config(cache_gib=358 * 64 / 2**30), "test") is not None
    assert calls == [3]


def test_of_a_part_of_a_large_set_only_the_part_is_decoded(monkeypatch):
    decoded = []
    original = cache.in_memory
    monkeypatch.setattr(cache, "in_memory", lambda e, threads: decoded.append(e) or original(e))
    held = sources.load(data_config(cache_gib=7 * 64 / 2**30), "test", count=7)
    assert [len(examples) for examples in decoded] == [len(held)] == [7]
    whole = sources.load(data_config(cache_gib=0), "test")
    np.testing.assert_array_equal(held.read(np.arange(7))[0], whole.read(np.arange(7))[0])


def test_labels_are_read_without_decoding(monkeypatch):
    streamed, held = (sources.load(data_config(cache_gib=gib), "test[:300]") for gib in (0, 1))
    expected = held.read(np.arange(300))[1]
    monkeypatch.setattr(sources, "decode", None)
    backwards = streamed.relabelled(streamed.class_names[::-1])
    for examples in (streamed, held):
        np.testing.assert_array_equal(examples.labels(), expected)
    np.testing.assert_array_equal(backwards.labels(), 9 - expected)
    np.testing.assert_array_equal(streamed.take(np.array([7, 3])).labels(), expected[[7, 3]])


def test_select_takes_the_first_and_refuses_more_than_there_are():
    whole = sources.load(data_config(), "test[:45]")
    assert len(sources.select(whole, 7)) == 7
    assert sources.select(whole, 0) is whole
    for count in (46, -1):
        with pytest.raises(UserError, match=f"{count} examples .* has 45"):
            sources.load(data_config(), "test[:45]", count=count)


def test_slices_and_views_keep_the_original_indices():
    whole = sources.load(data_config(), "test")
    part = sources.load(data_config(), "test[40:48]")
    np.testing.assert_array_equal(part.indices, np.arange(40, 48))
    view = part.take(np.array([5, 1])).take(np.array([1]))
    np.testing.assert_array_equal(view.indices, [41])
    for a, b in zip(view.read(np.array([0])), whole.read(np.array([41])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_slices_add_up():
    parts = [sources.load(data_config(), f"train[{s}]") for s in (":90%", "90%:")]
    both = sources.load(data_config(), "train[:90%]+train[90%:]")
    np.testing.assert_array_equal(np.concatenate([p.indices for p in parts]), np.arange(1438))
    np.testing.assert_array_equal(both.indices, np.arange(1438))


@given(n=st.integers(1, 358), seed=st.integers(0, 2**32))
def test_hold_out_is_disjoint_complete_and_reproducible(n, seed):
    examples = make_examples(359)
    train, held = sources.hold_out(examples, n, seed)
    assert len(held) == n
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train.indices, held.indices])), np.arange(359)
    )
    np.testing.assert_array_equal(held.indices, sources.hold_out(examples, n, seed)[1].indices)


def make_examples(n):
    def read(rows):
        images = np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 2, 1))
        return images.astype(np.uint8), rows.astype(np.int32)

    return Examples("made", ("a",), (2, 2, 1), np.arange(n), np.arange(n), read)


def test_hold_out_depends_on_the_seed_and_takes_the_right_images():
    examples = make_examples(200)
    train, held = sources.hold_out(examples, 50, 1)
    assert set(held.indices) != set(sources.hold_out(examples, 50, 2)[1].indices)
    np.testing.assert_array_equal(held.read(np.arange(50))[1], held.indices)
    np.testing.assert_array_equal(train.read(np.arange(150))[1], train.indices)


def test_hold_out_of_nothing_and_of_too_much():
    examples = make_examples(10)
    assert sources.hold_out(examples, 0, 0) == (examples, None)
    for n in (10, -1):
        with pytest.raises(UserError, match=rf"data.validation_examples is {n}; .* 10 examples"):
            sources.hold_out(examples, n, 0)


# --- folders ----------------------------------------------------------------------------------


def test_folder_labels_pixels_and_indices(folder):
    train = sources.load(data_config(f"folder:{folder}"), "train")
    images, labels = train.read(np.arange(40))
    assert train.class_names == ("a", "b")
    np.testing.assert_array_equal(np.sort(train.indices), np.arange(40))
    values = np.r_[np.arange(30), np.arange(100, 110)]  # by position in the sorted listing
    np.testing.assert_array_equal(images[:, 0, 0, 0], values[train.indices])
    np.testing.assert_array_equal(labels, train.indices >= 30)


def test_a_relative_folder_begins_in_the_data_directory(folder):
    config = data_config(f"folder:{folder.name}", dir=str(folder.parent))
    assert len(sources.load(config, "train")) == 40
    with pytest.raises(UserError, match=r"give the directory that holds it as data\.dir"):
        sources.load(data_config(f"folder:{folder.name}"), "train")


def test_a_class_that_a_split_lacks_does_not_shift_its_labels(folder):
    test = sources.load(data_config(f"folder:{folder}", cache_gib=0), "test")
    images, labels = test.read(np.array([0]))
    assert len(test) == 1
    assert labels.tolist() == [1]
    assert images[0, 0, 0, 0] == 7


def test_splits_of_other_classes_are_named(folder):
    config = data_config(f"folder:{folder}", train_split="train", test_split="test")
    train, test = (sources.load(config, split) for split in ("train", "test"))
    with pytest.raises(UserError, match=r"only one of data.train_split 'train' .* the classes a;"):
        sources.check_splits(config, train, test)


@pytest.mark.parametrize(
    ("train", "test", "common"),
    [
        ("train", "test", 0),
        ("train[:90%]", "train[90%:]", 0),
        ("train", "train", 1438),
        ("train+test", "test[:48]", 48),
        ("all", "test", 359),
        ("train[:100]", "train[90:]", 10),
    ],
)
def test_test_images_among_the_training_images_are_refused(train, test, common):
    config = data_config("digits", train_split=train, test_split=test)
    opened = [sources.load(config, split) for split in (train, test)]
    if not common:
        sources.check_splits(config, *opened)
        return
    with pytest.raises(UserError, match=f"data.test_split '.*' has {common} images of"):
        sources.check_splits(config, *opened)
    config.allow_overlap = True
    sources.check_splits(config, *opened)


def test_folder_slices_mix_the_classes_and_partition(folder):
    config = data_config(f"folder:{folder}")
    first, rest = (sources.load(config, f"train[{s}]") for s in (":50%", "50%:"))
    assert set(first.read(np.arange(20))[1]) == {0, 1}
    assert sorted([*first.indices, *rest.indices]) == list(range(40))


def test_folder_errors(folder):
    config = data_config(f"folder:{folder}", cache_gib=0)
    with pytest.raises(UserError, match="folder:/nowhere', which is no directory"):
        sources.load(data_config("folder:/nowhere"), "train")
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
        sources.load(data_config(f"folder:{folder}"), "train")
    (folder / "train/c").mkdir()
    with pytest.raises(UserError, match=r"train/c has no images \(\.jpg"):
        sources.load(config, "train")


def test_links_to_files_and_folders_are_followed(folder):
    (folder / "test/b/y.png").symlink_to(folder / "train/a/03.png")
    (folder / "val").symlink_to(folder / "test")
    examples = sources.load(data_config(f"folder:{folder}"), "val")
    assert sorted(examples.read(np.arange(2))[0][:, 0, 0, 0]) == [3, 7]


def test_folder_without_classes(tmp_path):
    write_image(tmp_path / "0.png")
    with pytest.raises(UserError, match="has no classes; arrange it as"):
        sources.load(data_config(f"folder:{tmp_path}"), "train")


# --- TFDS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", r"split 'validation'; it has train \(1438\), test \(359\)"),
        ("train[:9", r"slices are written as 'train\[:90%\]'"),
        ("test[:400]", r"digits/1.0.0 has no split 'test\[:400\]'"),
        ("", "has no split ''"),
        ("train[:0]", r"train\[:0\]' .* selects no examples"),
    ],
)
def test_split_errors(split, message):
    with pytest.raises(UserError, match=message):
        sources.load(data_config(), split)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1O", "TFDS has no data set 'cifar1O' .nearest: cifar10"),
        ("imagenette/320px-v3", "TFDS has no config '320px-v3' .nearest: 320px-v2"),
        ("cifar10/plain", "TFDS has no config 'plain'"),
        ("cifar10", "is not prepared in data.dir '.*vit-at prepare cifar10 --data_dir="),
        ("imagenette/320px-v2", "vit-at prepare imagenette/320px-v2 --data_dir"),
    ],
)
def test_name_errors(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        sources.load(data_config(name, dir=str(tmp_path)), "train")


def test_data_directory_comes_from_the_environment(monkeypatch, prepared):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    edit(prepared / "copied/1.0.0/dataset_info.json", '"name": "digits"', '"name": "copied"')
    for path in (prepared / "copied/1.0.0").glob("digits-*"):
        path.rename(path.with_name(path.name.replace("digits", "copied")))
    examples = sources.load(data_config("copied"), "train")
    assert (examples.name, len(examples)) == ("copied/1.0.0 train", 1438)
    assert backends.tfds_directory("/x") == backends.epath.Path("/x")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert backends.tfds_directory() == backends.epath.Path("~/tensorflow_datasets").expanduser()


def test_versions_and_configs(tmp_path):
    for path in ("a/1.9.0", "a/1.10.0", "a/notes", "b/x/1.0.0", "c/x/1.0.0", "c/y/2.0.0"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "dataset_info.json").touch()
    (tmp_path / "a/3.0.0").mkdir()  # an unfinished one

    def find(name):
        found = backends.find_prepared(name, tmp_path)
        return found and str(found.relative_to(tmp_path))

    assert find("a") == "a/1.10.0"
    assert find("a:1.9.0") == "a/1.9.0"
    assert find("a:1.8.0") is None
    assert find("b") == find("b/x") == "b/x/1.0.0"
    assert find("c/y") == "c/y/2.0.0"
    assert find("nothing") is None
    with pytest.raises(UserError, match=r"several configs .* \(x, y\); choose one, as in 'c/x'"):
        find("c")


def test_tfrecord_is_refused_with_the_remedy(prepared):
    edit(prepared / "copied/1.0.0/dataset_info.json", "array_record", "tfrecord")
    with pytest.raises(UserError, match=r"stored as tfrecord.* run `vit-at prepare copied"):
        sources.load(data_config("copied", dir=str(prepared)), "train")


def test_a_set_without_labels_is_refused(prepared):
    edit(prepared / "copied/1.0.0/features.json", '"label"', '"name"')
    with pytest.raises(UserError, match="needs features 'image' and 'label', and has image, name"):
        sources.load(data_config("copied", dir=str(prepared)), "train")


def test_hidden_labels_are_refused(prepared):
    edit(prepared / "copied/1.0.0/features.json", '"numClasses": "10"', '"numClasses": "9"')
    (prepared / "copied/1.0.0/label.labels.txt").write_text("\n".join("012345678") + "\n")
    with pytest.raises(UserError, match=r"image \d+ of digits/1.0.0 train has no label \(9\)"):
        sources.load(data_config("copied", dir=str(prepared)), "train")


def test_a_damaged_record_file_is_named(prepared):
    path = prepared / "copied/1.0.0/digits-test.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"digits/1.0.0 test can't be read"):
        sources.load(data_config("copied", dir=str(prepared)), "test")


def test_only_the_image_and_the_label_of_a_record_are_read(prepared):
    """So no other feature, such as a video, is decoded by a program."""
    path = prepared / "copied/1.0.0/features.json"
    described = json.loads(path.read_text())
    features = described["featuresDict"]["features"]
    features["more"] = features["image"]  # no record has it
    path.write_text(json.dumps(described))
    examples = sources.load(data_config("copied", dir=str(prepared)), "test")
    expected = sources.load(data_config(), "test")
    for ours, theirs in zip(*(e.read(np.arange(359)) for e in (examples, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@runs.needs_tfds
def test_cifar10():
    config = data_config("cifar10", dir=str(runs.TFDS), image_size=32, mean=(0, 0, 0), cache_gib=0)
    examples = sources.load(config, "train")
    assert len(examples) == 50_000
    assert examples.class_names[3] == "cat"
    images, labels = examples.read(np.arange(200))
    assert images.shape == (200, 32, 32, 3)
    assert set(labels) == set(range(10))


@runs.needs_tfds
def test_imagenet_photos_are_resized():
    config = data_config("imagenet2012", dir=str(runs.TFDS), image_size=64, mean=(0, 0, 0))
    examples = sources.load(config, "validation[:20]")
    images, labels = examples.read(np.arange(20))
    assert examples.num_classes == 1000
    assert images.shape == (20, 64, 64, 3)
    assert (images.reshape(20, -1).std(1) > 10).all()
    assert len(set(labels)) == 20
