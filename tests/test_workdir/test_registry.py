"""Models by name: that the packaged ones are what was measured, and where others come from."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import runs

import vit_at
from vit_at import weights
from vit_at.data import sources
from vit_at.errors import UserError
from vit_at.evaluation.protocol import weights_digest
from vit_at.reporting import list_models
from vit_at.training.setup import initial_state
from vit_at.workdir import registry
from vit_at.workdir.results import Results

DIGITS, CIFAR = "digits_deit_64x2", "cifar10_convit_96x4"
CONV, LARGER = "cifar10_convit_96x4_conv", "cifar10_convit_128x5_conv"
_photographs = [runs.needs_tfds, pytest.mark.campaign]
with_data = [DIGITS, *(pytest.param(name, marks=_photographs) for name in (CIFAR, CONV, LARGER))]


def test_the_models_are_those_that_were_listed():
    assert registry.NAMES == (LARGER, CIFAR, CONV, DIGITS)


@pytest.mark.parametrize("name", with_data)
def test_evaluation_gives_the_recorded_outcome_of_each_image(name, tmp_path):
    records = vit_at.evaluate(
        name,
        "clean,pgd-20",
        num_examples=200,
        workdir=str(tmp_path),
        data_dir="" if name == DIGITS else str(runs.TFDS),
    )
    stored, found = Results(registry.PACKAGED / name), Results(tmp_path)
    for record in records:
        of_then = {k: v for k, v in record["protocol"].items() if k != "contents"}
        places, expected = stored.outcomes(record | {"protocol": of_then})
        own, correct = found.outcomes(record)
        np.testing.assert_array_equal(own, places)
        # Another processor rounds differently, which may decide an image on the boundary.
        assert (correct != expected).sum() <= 1, record["attack"]


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_packaged_model_is_small_whole_and_says_which_weights_were_measured(name):
    directory, loaded = registry.PACKAGED / name, vit_at.load(name)
    about = json.loads((directory / "model.json").read_text())
    assert sum(path.stat().length for path in directory.iterdir()) < 5e6
    timms = set() if name in (CONV, LARGER) else {"config.json"}  # timm has no stem like that
    assert {"load.py", "README.md"} | timms <= about["files"].keys()
    for file, digest in about["files"].items():
        assert hashlib.sha256((directory / file).read_bytes()).hexdigest() == digest, file
    digests = {record["protocol"]["weights"]["digest"] for record in loaded.record}
    assert digests == {weights_digest(loaded.params)}
    assert {"clean", "autoattack"} <= {record["attack"] for record in loaded.record}
    assert '"/' not in (directory / "model.json").read_text()


@pytest.mark.slow
def test_a_loaded_model_is_called_and_attacked():
    loaded = vit_at.load(DIGITS)
    assert loaded.class_names == tuple("0123456789")
    assert repr(loaded).endswith("102,218 parameters>")
    images, labels = sources.load(loaded.config.data, "test").read(np.arange(32))
    images = images.astype(np.float32) / 255
    correct = np.asarray(loaded(images)).argmax(-1) == labels
    assert correct.mean() > 0.9
    threat = vit_at.Threat(eps=0.15, step_size=0.0375, steps=5)
    attacked = vit_at.pgd_attack(loaded, images, labels, jax.random.key(0), threat)
    assert (np.asarray(loaded(attacked)).argmax(-1) == labels).sum() < correct.sum()
    options = {"attacks": ["apgd-ce"], "batch_size": 8, "budget": vit_at.autoattack.Budget(3)}
    result = vit_at.autoattack.run(loaded, images[:8], labels[:8], eps=0.15, **options)
    np.testing.assert_array_equal(result.robust["clean"], correct[:8])


def test_a_run_starts_from_a_packaged_model():
    loaded = vit_at.load(DIGITS)
    setup = runs.tiny_setup(model__pretrained=DIGITS)._replace(model=loaded.model)
    state = initial_state(setup, runs.optimizer_of(setup))
    jax.tree.map(np.testing.assert_array_equal, state.params, loaded.params)
    exported = runs.tiny_setup(model__pretrained=str(registry.PACKAGED / DIGITS))
    state = initial_state(exported._replace(model=loaded.model), runs.optimizer_of(setup))
    assert weights_digest(state.params) == weights_digest(loaded.params)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "images are uint8; divide them by 255"),
        (np.full((2, 8, 8, 1), 200.0), r"range from 200 to 200; they must be in \[0, 1\]"),
        (np.full((2, 8, 8, 1), np.nan), "range from nan to nan"),
        (np.zeros((2, 1, 8, 8)), r"shape \(2, 1, 8, 8\); the model takes \[B, 8, 8, 1\]"),
        (np.zeros((2, 8, 8, 3)), r"the model takes \[B, 8, 8, 1\]"),
        (np.zeros((8, 8, 1)), r"the model takes \[B, 8, 8, 1\]"),
        (np.zeros((0, 8, 8, 1)), r"\[B, 8, 8, 1\], B > 0"),
        (0.5, r"shape \(\); the model takes"),
    ],
)
def test_a_loaded_model_refuses_other_images(images, said):
    loaded = vit_at.load(DIGITS)
    with pytest.raises(UserError, match=said):
        loaded(images)


def test_a_loaded_model_is_traced():
    loaded, images = vit_at.load(DIGITS), np.full((2, 8, 8, 1), 0.5, np.float32)
    logits = jax.jit(lambda x: loaded(x))(images)
    np.testing.assert_allclose(logits, loaded(images), atol=1e-4)
    with pytest.raises(UserError, match="images are uint8"):
        jax.jit(lambda x: loaded(x))(np.zeros((2, 8, 8, 1), np.uint8))


def test_the_best_model_of_a_recipe_has_a_name_of_its_own(capsys):
    assert registry.place("cifar10_small_at") == registry.PACKAGED / LARGER
    assert list_models.main(["--robust", "cifar10_small_at"]) == 0
    assert capsys.readouterr().out.startswith(f"{LARGER}, or cifar10_small_at\n")


def test_a_directory_comes_before_a_packaged_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(registry.PACKAGED / CIFAR, tmp_path / DIGITS)
    assert vit_at.load(DIGITS).config.model.name == "convit_tiny"


def test_an_uploaded_export_is_loaded_from_the_hub(monkeypatch):
    asked = []

    def fetch(name, file=weights.files.HUB_FILE):
        asked.append((name, file))
        return registry.PACKAGED / DIGITS / file

    monkeypatch.setattr(registry, "fetch", fetch)
    loaded = vit_at.load("hf:me/digits@v1")
    assert asked == [("me/digits@v1", "model.safetensors"), ("me/digits@v1", "model.json")]
    assert weights_digest(loaded.params) == weights_digest(vit_at.load(DIGITS).params)


def test_the_list_says_what_was_measured_and_how(capsys):
    assert list_models.main(["--robust"]) == 0
    shown = capsys.readouterr().out
    assert "458,374 parameters, trained on cifar10 against linf 8/255" in shown
    assert "autoattack    28.52  n = 256    linf 8/255" in shown
    assert "weights 78759233fe5e48ab" in shown
    assert "CIFAR-10 (JPEG)" in shown


def test_reading_a_packaged_model_says_nothing(capfd):
    registry.load("digits_deit_64x2")
    assert capfd.readouterr().err == ""
