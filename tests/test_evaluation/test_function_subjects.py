"""Evaluation of functions MODULE:NAME, by the command."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at import evaluate
from vit_at.configs import default
from vit_at.errors import UserError
from vit_at.evaluation.functions import of_function

MODULE = """
import jax
import jax.numpy as jnp
import numpy as np
SIGN = {sign}
def logits(images):
    grey = images.mean((1, 2, 3))
    return SIGN * jnp.stack([grey - 0.4, 0.5 - grey, 0 * grey], -1)
def features(images):
    return images
def two(images):
    return images[:2, 0, 0]
def on_host(images):
    return float(images[0, 0, 0, 0])
def not_finite(images):
    return logits(images) / jnp.array([1, 1, 0])  # 0 / 0
def of_batch(images):
    return logits(images - images.mean(0))
def of_neighbour(images):
    return logits(images + jnp.roll(images, 1, 0))
def probabilities(images):
    return jax.nn.softmax(logits(images).astype(jnp.bfloat16))
def noisy(images):
    return logits(images) + np.random.default_rng().normal(size=(len(images), 3))
def half(images):
    return logits(images).astype(jnp.bfloat16)
def blind(images):
    shape = jax.ShapeDtypeStruct((len(images), 3), np.float32)
    return jax.pure_callback(lambda x: np.tile(x.mean((1, 2, 3))[:, None], 3), shape, images)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the module mine.py, 20 images and their labels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mine", "theirs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine.py").write_text(MODULE.format(sign=1))
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.integers(0, 256, (20, 16, 16, 3)).astype(np.uint8))
    np.save("labels.npy", rng.permutation(np.arange(20) % 3))
    return tmp_path


def subject(name):
    return of_function(name, default.get_config().unlock(), 16)


def run(name, attacks):
    """Runs the command; the records that are stored after it."""
    options = ["--image_size=16", "--data=npy:images.npy", "--batch_size=8", "--workdir=there"]
    assert evaluate.main([f"--function={name}", f"--attacks={attacks}", *options]) == 0
    with open("there/results.json") as file:
        return json.load(file)


def test_the_command_evaluates_a_function_of_a_module_here(here):
    (here / "theirs.py").write_text(MODULE.format(sign=-1))
    digests, images = set(), np.load("images.npy").astype(np.float32) / 255
    for name in ("mine:logits", "theirs:logits"):
        clean, _ = run(name, "clean,pgd-1")[-2:]
        found = subject(name)
        predicted = found.apply(found.params, images).argmax(-1)
        assert clean["correct"] == (predicted == np.load("labels.npy")).sum()
        assert clean["protocol"]["weights"]["source"] == name
        digests.add(clean["protocol"]["weights"]["digest"])
    assert len(digests) == 2
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("features", ", which gives"),
        ("two", ", which gives"),
        ("on_host", ", which JAX can't trace"),
        ("not_finite", ", which gives NaN or infinity for 8 of 8 random images"),
        ("of_batch", ", but the logits of an image depend on the other images"),
        ("of_neighbour", ", but the logits of an image depend on the other images"),
    ],
)
def test_a_function_that_does_not_give_each_image_its_logits_is_refused(name, said, here):
    with pytest.raises(UserError, match=f"^--function is 'mine:{name}'{said}"):
        subject(f"mine:{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("logits", ""),
        ("half", ""),
        ("probabilities", "outputs are probabilities, not logits"),
        ("noisy", "which gives other logits whenever JAX traces it"),
    ],
)
def test_a_function_that_misleads_attacks_is_told_in_one_line(name, said, here, capsys):
    subject(f"mine:{name}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said)
    assert all(line.startswith(f"--function is 'mine:{name}', ") and said in line for line in lines)


def test_results_of_another_gradient_are_not_taken_for_those_of_a_function(here):
    assert len(run("mine:logits", "clean,pgd-1")) == 2
    assert len(run("mine:logits", "clean,pgd-1")) == 2  # found again
    module = sys.modules["mine"]
    plain = module.logits
    module.logits = jax.custom_vjp(plain)  # as after an edit of the file
    module.logits.defvjp(lambda x: (plain(x), x.shape), lambda shape, g: (jnp.ones(shape),))
    stored = run("mine:logits", "clean,pgd-1")
    digests = [record["protocol"]["weights"]["digest"] for record in stored]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_a_function_without_a_gradient_is_known_by_its_logits(here):
    assert subject("mine:blind").params.keys() == {"logits"}
    assert subject("mine:logits").params.keys() == {"logits", "gradient"}
    (record,) = run("mine:blind", "clean")
    assert record["protocol"]["num_examples"] == 20
