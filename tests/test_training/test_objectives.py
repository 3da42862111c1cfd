"""The table of objectives, and what asks it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vit_at.attacks import Threat
from vit_at.attacks.losses import cross_entropy
from vit_at.training import OBJECTIVES, metrics, perturb, training_loss
from vit_at.training.attack import Draws
from vit_at.training.objectives import ADVERSARIAL, CLEAN, Objective, ce_attack

IMAGES = jax.random.uniform(jax.random.key(0), (4, 2, 2, 1))
TARGETS = jnp.eye(3)[jnp.arange(4) % 3]
PARAMS = jax.random.normal(jax.random.key(1), (4, 3))


def linear(params, images, attn_grad_keep=None, train=False, rngs=None):
    return images.reshape(len(images), -1) @ params


def test_the_objectives_are_those_of_the_paper():
    assert tuple(OBJECTIVES) == ("natural", "at", "trades", "mart")
    assert [row.label for row in OBJECTIVES.values()] == ["natural", "AT", "TRADES", "MART"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_says_which_logits_and_terms_there_are(name):
    loss, aux = training_loss(name, linear, PARAMS, IMAGES, 1 - IMAGES, TARGETS, beta=3.0)
    row = OBJECTIVES[name]
    for kind, images, of in (("clean", CLEAN, IMAGES), ("adv", ADVERSARIAL, 1 - IMAGES)):
        logits = aux.pop(f"logits_{kind}")
        if images in row.images:
            np.testing.assert_array_equal(logits, linear(PARAMS, of))
        else:
            assert logits is None
    expected = sum(3.0 * term if n == "robust" else term for n, term in aux.items())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stochastic_depth_draws_for_each_pass_of_its_own(name):
    """As two passes of PyTorch do; the keys of a single pass are those that were given."""
    given, used = jax.random.split(jax.random.key(0), len(IMAGES)), []

    def apply(params, images, train, rngs):
        used.append(jax.random.key_data(rngs["drop_path"]))
        return linear(params, images)

    training_loss(name, apply, PARAMS, IMAGES, IMAGES, TARGETS, rngs={"drop_path": given})
    np.testing.assert_array_equal(used[-1], jax.random.key_data(given))
    everything = np.concatenate(used)
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert len(used) == len(OBJECTIVES[name].images)


@pytest.fixture
def own(monkeypatch):
    """An objective that is not in the table: the clean images alone are trained on."""

    def terms(clean, adv, targets, beta):
        assert adv is None
        return {"natural": (cross_entropy(clean, targets).mean(), beta)}

    monkeypatch.setitem(OBJECTIVES, "own", Objective("OWN", ce_attack, terms, (CLEAN,)))
    return "own"


def test_a_row_is_all_that_an_objective_needs(own):
    loss, aux = training_loss(own, linear, PARAMS, IMAGES, IMAGES, TARGETS, beta=2.0)
    np.testing.assert_allclose(loss, 2 * aux["natural"], rtol=1e-6)
    draws = Draws(jnp.zeros_like(IMAGES), None, None)
    options = {"threat": Threat("linf", 0.1, 0.1, 2)}
    as_at, adversarial = (
        perturb(linear, PARAMS, IMAGES, TARGETS, draws, objective=name, **options)
        for name in ("at", own)
    )
    np.testing.assert_array_equal(adversarial, as_at)
    config = runs.smoke(objective=own, threat__steps=10, batch_size=1)
    assert metrics.step_flops(config, 1.0) == 2 * 10 + 3
