"""Reading images: TFDS and digits give the right pixels, labels and error sentences."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import data_sets
import numpy as np
import pytest
import runs

from vit_at.data import backends, sources
from vit_at.errors import UserError

DIGITS = backends.PACKAGED / "digits" / "1.0.0"
DIGITS_SHA256 = "6c5bf357dcf4e2941347db518b991789d1dc0b1e3181b078659b42c42b040585"


@pytest.fixture
def prepared(tmp_path):
    """A TFDS directory with a copy of the digits under the name 'copied'."""
    shutil.copytree(DIGITS, tmp_path / "copied" / "1.0.0")
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_digits_are_all_there():
    train, test = (sources.load(data_sets.config(), split) for split in ("train", "test"))
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
        examples = sources.load(data_sets.config(), split)
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
    config = data_sets.config("digits", train_split=train, test_split=test)
    opened = [sources.load(config, split) for split in (train, test)]
    if not common:
        sources.check_splits(config, *opened)
        return
    with pytest.raises(UserError, match=f"data.test_split '.*' has {common} images of"):
        sources.check_splits(config, *opened)
    config.allow_overlap = True
    sources.check_splits(config, *opened)


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
        sources.load(data_sets.config(), split)


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
        sources.load(data_sets.config(name, dir=str(tmp_path)), "train")


def test_data_directory_comes_from_the_environment(monkeypatch, prepared):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    edit(prepared / "copied/1.0.0/dataset_info.json", '"name": "digits"', '"name": "copied"')
    for path in (prepared / "copied/1.0.0").glob("digits-*"):
        path.rename(path.with_name(path.name.replace("digits", "copied")))
    examples = sources.load(data_sets.config("copied"), "train")
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
        sources.load(data_sets.config("copied", dir=str(prepared)), "train")


def test_a_set_without_labels_is_refused(prepared):
    edit(prepared / "copied/1.0.0/features.json", '"label"', '"name"')
    with pytest.raises(UserError, match="needs features 'image' and 'label', and has image, name"):
        sources.load(data_sets.config("copied", dir=str(prepared)), "train")


def test_hidden_labels_are_refused(prepared):
    edit(prepared / "copied/1.0.0/features.json", '"numClasses": "10"', '"numClasses": "9"')
    (prepared / "copied/1.0.0/label.labels.txt").write_text("\n".join("012345678") + "\n")
    with pytest.raises(UserError, match=r"image \d+ of digits/1.0.0 train has no label \(9\)"):
        sources.load(data_sets.config("copied", dir=str(prepared)), "train")


def test_a_damaged_record_file_is_named(prepared):
    path = prepared / "copied/1.0.0/digits-test.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"digits/1.0.0 test can't be read"):
        sources.load(data_sets.config("copied", dir=str(prepared)), "test")


def test_only_the_image_and_the_label_of_a_record_are_read(prepared):
    """So no other feature, such as a video, is decoded by a program."""
    path = prepared / "copied/1.0.0/features.json"
    described = json.loads(path.read_text())
    features = described["featuresDict"]["features"]
    features["more"] = features["image"]  # no record has it
    path.write_text(json.dumps(described))
    examples = sources.load(data_sets.config("copied", dir=str(prepared)), "test")
    expected = sources.load(data_sets.config(), "test")
    for ours, theirs in zip(*(e.read(np.arange(359)) for e in (examples, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@runs.needs_tfds
def test_cifar10():
    config = data_sets.config(
        "cifar10", dir=str(runs.TFDS), image_size=32, mean=(0, 0, 0), cache_gib=0
    )
    examples = sources.load(config, "train")
    assert len(examples) == 50_000
    assert examples.class_names[3] == "cat"
    images, labels = examples.read(np.arange(200))
    assert images.shape == (200, 32, 32, 3)
    assert set(labels) == set(range(10))


@runs.needs_tfds
def test_imagenet_photos_are_resized():
    config = data_sets.config("imagenet2012", dir=str(runs.TFDS), image_size=64, mean=(0, 0, 0))
    examples = sources.load(config, "validation[:20]")
    images, labels = examples.read(np.arange(20))
    assert examples.num_classes == 1000
    assert images.shape == (20, 64, 64, 3)
    assert (images.reshape(20, -1).std(1) > 10).all()
    assert len(set(labels)) == 20
