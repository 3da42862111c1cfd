"""Extra images: the file stays on disk, and each batch holds its share, in a reproducible order."""

import numpy as np
import pytest
import runs
from PIL import Image

from vit_at.data import pipeline
from vit_at.data.examples import Examples
from vit_at.data.extra import Extra, joined, open_npz
from vit_at.errors import UserError
from vit_at.training.setup import Setup

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2, 1])


def stored(tmp_path, save=np.savez, **arrays):
    path = tmp_path / "extra.npz"
    save(path, **({"image": IMAGES, "label": LABELS} | arrays))
    return path


def test_the_images_of_a_file_are_mapped_and_read_by_position(tmp_path, monkeypatch):
    path = stored(tmp_path)
    maps = []
    original = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: maps.append(a) or original(*a, **k))
    examples = open_npz(path, runs.examples(5))
    assert len(maps) == 2
    images, labels = examples.read(np.array([6, 0, 3]))
    np.testing.assert_array_equal(images, IMAGES[[6, 0, 3]])
    np.testing.assert_array_equal(labels, LABELS[[6, 0, 3]])
    assert (len(examples), labels.dtype, images.dtype) == (7, np.int32, np.uint8)


WRONG = {
    "compressed": ({"save": np.savez_compressed}, "it is compressed; store it by numpy.savez"),
    "no images": ({"save": lambda path, label, image: np.savez(path, label=label)}, "image"),
    "other pixels": ({"image": IMAGES / 255}, r"float64 \(8, 8, 1\).*uint8 \(8, 8, 1\)"),
    "another size": ({"image": IMAGES[:, :4]}, r"uint8 \(4, 8, 1\)"),
    "too few labels": ({"label": LABELS[:3]}, "one whole number for each of the 7 images"),
    "fractions": ({"label": LABELS / 2}, "labels float64"),
    "another class": ({"label": LABELS + 1}, "from 1 to 3; they must be from 0 to 2"),
    "no image": ({"image": IMAGES[:0], "label": LABELS[:0]}, "labels none"),
    "Python objects": ({"label": np.array([{}] * 7, object)}, "plain numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_refused(case, tmp_path):
    options, says = WRONG[case]
    with pytest.raises(UserError, match=says):
        open_npz(stored(tmp_path, **options), runs.examples(5))


def test_no_archive_is_refused(tmp_path):
    (tmp_path / "extra.npz").write_text("<html>")
    with pytest.raises(UserError, match=r"can't be read .*not a zip file"):
        open_npz(tmp_path / "extra.npz", runs.examples(5))


def numbered(n, first):
    """Examples whose labels count from ``first``."""
    rows = np.arange(n)

    def read(rows):
        return np.zeros((len(rows), 2, 2, 1), np.uint8), (rows + first).astype(np.int32)

    return Examples("made", ("a",), (2, 2, 1), rows, rows, read)


def batches(first, last, processes=1, extra=Extra(numbered(11, 1000), 3)):  # noqa: B008
    """[steps, batch] labels, put together from all processes."""
    options = {"batch_size": 8, "seed": 5, "first_step": first, "last_step": last, "threads": 2}
    parts = [
        [b["label"] for b in pipeline.train_batches(
            numbered(23, 0), **options, process=(index, processes), extra=extra
        )]
        for index in range(processes)
    ]  # fmt: skip
    return np.array([np.concatenate(step) for step in zip(*parts, strict=True)])


def test_each_batch_holds_its_share_and_every_image_comes_once_a_pass():
    labels = batches(0, 60)
    assert labels.shape == (60, 8)
    assert ((labels >= 1000).sum(1) == 3).all()
    for rows, n in ((labels[:, :5].ravel(), 23), (labels[:, 5:].ravel() - 1000, 11)):
        passes = rows[: len(rows) // n * n].reshape(-1, n)
        np.testing.assert_array_equal(np.sort(passes, 1), np.tile(np.arange(n), (len(passes), 1)))
        assert len({tuple(p) for p in passes}) == len(passes)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_is_a_function_of_seed_and_step(processes):
    np.testing.assert_array_equal(batches(7, 12, processes), batches(0, 12)[7:])


def test_joined_examples_are_read_in_any_order():
    both = joined(numbered(4, 0), numbered(3, 100))
    labels = both.take(np.array([6, 0, 4, 3])).read(np.arange(4))[1]
    np.testing.assert_array_equal(labels, [102, 0, 100, 3])


def test_images_of_validation_and_test_are_no_extra_ones():
    options = {"data__extra__name": "digits", "data__extra__fraction": 0.5}
    options |= {"data__train_split": "train[:400]", "data__validation_examples": 30}

    def extra_images(split, **changes):
        config = runs.smoke(**runs.QUICK, **options, data__extra__split=split, **changes)
        return len(Setup.of(config).extra.examples)

    with pytest.raises(UserError, match="'test' has 48 images of the test; choose"):
        extra_images("test")
    with pytest.raises(UserError, match="'train' has 30 images held out for validation; choose"):
        extra_images("train")
    assert extra_images("test", data__allow_overlap=True) == 359
    assert extra_images("train[400:500]") == 100


def test_a_run_mixes_in_a_file_and_refuses_what_does_not_fit(tmp_path):
    digits = Setup.of(runs.smoke(**runs.QUICK)).train_set
    images, labels = digits.read(np.arange(20))
    np.savez(tmp_path / "more.npz", image=images, label=labels)
    name = f"npz:{tmp_path / 'more.npz'}"
    options = runs.QUICK | {"data__extra__name": name, "data__extra__fraction": 0.7}
    setup = Setup.of(runs.smoke(**options))
    assert (setup.extra.images, len(setup.extra.examples)) == (22, 20)
    assert setup.fingerprint["data"]["extra_images"] == 20
    with pytest.raises(UserError, match=r"fraction is 0.001, or 0 of the 32 images"):
        Setup.of(runs.smoke(**options | {"data__extra__fraction": 0.001}))
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / "pets" / "train" / name / "1.png")
    with pytest.raises(UserError, match="whose classes differ from those of 'digits'"):
        Setup.of(runs.smoke(**options | {"data__extra__name": f"folder:{tmp_path / 'pets'}"}))
