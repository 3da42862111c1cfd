"""An image whose logits are not finite is never correct: in any evaluation, for any model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_at.attacks import Threat, autoattack
from vit_at.attacks.autoattack import Budget
from vit_at.distributed import sharding
from vit_at.evaluation.evaluator import Evaluator
from vit_at.evaluation.protocol import parse_attacks
from vit_at.training import step

NOT_FINITE = st.sampled_from([np.nan, np.inf, -np.inf])
CLASSES = 5
EPS = 0.02
EXAMPLES = runs.examples(45)
IMAGES = EXAMPLES.read(np.arange(45))[0].astype(np.float32) / 255
LABELS = EXAMPLES.read(np.arange(45))[1]
MEANS = IMAGES.mean((1, 2, 3))


def holed(params, images):
    """A linear model, one of whose logits is not finite for images darker than a threshold."""
    kernel, threshold, column, value = params
    logits = images.reshape(len(images), -1) @ kernel
    dark = images.mean((1, 2, 3)) < threshold
    return logits.at[:, column].set(jnp.where(dark, value, logits[:, column]))


def parameters(seed, threshold, column, value):
    kernel = np.random.default_rng(seed).normal(size=(64, CLASSES)).astype(np.float32)
    return jax.tree.map(jnp.asarray, (kernel, np.float32(threshold), column, np.float32(value)))


@functools.cache
def evaluator():
    attacks = parse_attacks("clean,pgd-3,cw-3", Threat("linf", EPS, EPS / 2, 3), restarts=2)
    mesh = sharding.make_mesh(jax.devices()[:1])
    return Evaluator(holed, EXAMPLES, attacks, mesh, batch_size=16, seed=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.4, 0.6), st.integers(0, CLASSES - 1), NOT_FINITE)
def test_clean_pgd_and_cw(seed, threshold, column, value):
    params = parameters(seed, threshold, column, value)
    found = dict(evaluator()(params))
    logits = np.asarray(holed(params, jnp.asarray(IMAGES)))
    right = np.isfinite(logits).all(1) & (logits.argmax(1) == LABELS)
    np.testing.assert_array_equal(found["clean"], right)
    whole_ball = np.less(MEANS + EPS, threshold)
    assert not (found["pgd-3"] & whole_ball).any()
    assert not (found["cw-3"] & whole_ball).any()


def robust_to(name, params, labels):
    """Robust images [N] after one attack of AutoAttack, and the logits of what it found."""
    options = {"eps": EPS, "attacks": [name], "batch_size": 16, "budget": Budget(5, 40)}
    result = autoattack.run(functools.partial(holed, params), IMAGES, labels, **options)
    assert not result.failures
    return result.robust[name], np.asarray(holed(params, jnp.asarray(result.adversarial)))


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.integers(0, CLASSES - 1), NOT_FINITE)
def test_each_attack_of_autoattack(name, seed, column, value):
    """The clean images are above the threshold, and some come below it within the ball.

    An attack ends at its first success, so APGD and Square find the same where a wrong class is the
    answer below the threshold.
    """
    params = parameters(seed, MEANS.min() - EPS / 4, column, value)
    labels = np.asarray(holed(params, jnp.asarray(IMAGES))).argmax(1)
    robust, logits = robust_to(name, params, labels)
    right = np.isfinite(logits).all(1) & (logits.argmax(1) == labels)
    np.testing.assert_array_equal(robust, right)
    if not name.startswith("fab"):
        wrong = parameters(seed, MEANS.min() - EPS / 4, column, -1e6)
        others = labels == column  # the label's own logit falls
        np.testing.assert_array_equal(robust[others], robust_to(name, wrong, labels)[0][others])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_accuracies_of_a_training_step(data):
    """They choose among checkpoints, and stand in the log."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits, labels = rng.normal(size=(12, CLASSES)), rng.integers(0, CLASSES, 12)
    logits[np.arange(12), labels] += 9
    places = st.tuples(st.integers(0, 11), st.integers(0, CLASSES - 1))
    spoiled = data.draw(st.lists(places, min_size=1, max_size=8))
    for row, column in spoiled:
        logits[row, column] = data.draw(NOT_FINITE)
    aux = {"logits_adv": jnp.asarray(logits), "logits_clean": jnp.asarray(logits)}
    metrics = step._batch_metrics(aux, jax.nn.one_hot(labels, CLASSES))
    share = 1 - len({row for row, _ in spoiled}) / 12
    assert metrics["accuracy_adv"] == pytest.approx(share)
    assert metrics["accuracy_clean"] == pytest.approx(share)
