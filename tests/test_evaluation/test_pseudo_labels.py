"""Labels that a model writes, and a run that trains on them."""

import jax
import numpy as np
import pytest
import runs

import vit_at
from vit_at.data.extra import open_npz
from vit_at.data.sources import load
from vit_at.evaluate import evaluate
from vit_at.training.loop import train

MODEL = "digits_deit_64x2"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of labels of the first 50 test digits."""
    folder = tmp_path_factory.mktemp("labels")
    path = folder / "labels.npz"
    options = {"num_examples": 50, "batch_size": 16, "workdir": str(folder / "results")}
    evaluate(MODEL, "clean", write_labels=str(path), **options)
    return path


def test_they_are_the_classes_and_probabilities_of_the_model(written):
    loaded = vit_at.load(MODEL)
    images, _ = load(loaded.config.data, "test").read(np.arange(50))
    probabilities = np.asarray(jax.nn.softmax(loaded(images.astype(np.float32) / 255)))
    with np.load(written) as arrays:
        np.testing.assert_array_equal(arrays["image"], images)
        np.testing.assert_array_equal(arrays["label"], probabilities.argmax(-1))
        np.testing.assert_allclose(arrays["confidence"], probabilities.max(-1), rtol=1e-5)
        assert (arrays["image"].dtype, arrays["confidence"].dtype) == (np.uint8, np.float32)
    assert [p.name for p in written.parent.iterdir() if p.is_file()] == ["labels.npz"]


def test_they_may_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"num_examples": 4, "batch_size": 4, "workdir": str(tmp_path / "results")}
    evaluate(MODEL, "clean", write_labels="~/labels.npz", **options)
    with np.load(tmp_path / "labels.npz") as arrays:
        assert len(arrays["label"]) == 4


def test_a_run_trains_on_them(written, tmp_path):
    like = load(vit_at.load(MODEL).config.data, "train")
    extra = open_npz(written, like)
    assert len(extra) == 50
    options = {"data__extra__name": f"npz:{written}", "data__extra__fraction": 0.5}
    records = train(runs.smoke(**runs.QUICK, **options, eval__attacks="clean"), str(tmp_path))
    assert records[0]["attack"] == "clean"
