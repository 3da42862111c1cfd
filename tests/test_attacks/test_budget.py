"""What an evaluation may compute and keep: restarts, targets, individual runs, the worst image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vit_at.attacks import autoattack, losses
from vit_at.attacks.autoattack import Budget, Settings, methods
from vit_at.errors import UserError

SHAPE, CLASSES = (4, 4, 2), 5
SHORT = Budget(iterations=12, queries=60)


def network(params, images):
    first, second = params
    return jnp.tanh(images.reshape(len(images), -1) @ first) @ second


def problem(seed=0, count=16):
    keys = jax.random.split(jax.random.key(seed), 3)
    images = np.asarray(jax.random.uniform(keys[0], (count, *SHAPE)))
    params = (jax.random.normal(keys[1], (32, 12)), jax.random.normal(keys[2], (12, CLASSES)))
    return params, images, np.array(network(params, images)).argmax(1)


def attack(seed=0, **options):
    params, images, labels = problem(seed)
    options = {"batch_size": 8, "eps": 0.05, "budget": SHORT} | options
    return autoattack.run(functools.partial(network, params), images, labels, **options)


@pytest.mark.parametrize(
    ("options", "name", "restarts", "targets"),
    [
        ({}, "apgd-ce", 1, 1),
        ({}, "apgd-t", 1, 9),
        ({"norm": "l1"}, "apgd-ce", 5, 1),
        ({"norm": "l1"}, "apgd-t", 1, 5),
        ({"norm": "l1"}, "fab-t", 1, 9),
        ({"norm": "l1", "attacks": "plus"}, "apgd-t", 1, 9),
        ({"attacks": "plus"}, "apgd-dlr", 5, 1),
        ({"attacks": "plus"}, "fab", 5, 1),
        ({"attacks": "plus"}, "square", 1, 1),
        ({"attacks": "rand"}, "apgd-ce", 1, 1),
        ({"budget": Budget(restarts=3, targets=2)}, "apgd-t", 3, 2),
        ({"budget": Budget(restarts=3)}, "square", 3, 1),
    ],
)
def test_runs_of_an_image_are_the_official_ones_unless_given(options, name, restarts, targets):
    method = methods.make(name, Settings(**{"eps": 0.1} | options), num_classes=100)
    assert (method.restarts, method.targets, method.runs) == (restarts, targets, restarts * targets)
    assert [method.rank(run) for run in range(method.runs)] == [
        target for target in range(targets) for _ in range(restarts)
    ]


def test_samples_and_rho_reach_apgd():
    settings = Settings(attacks="rand", budget=Budget(samples=7, rho=0.5))
    method = methods.make("apgd-ce", settings, CLASSES)
    assert (method.samples, method.rho, method.passes) == (7, 0.5, 21)


def test_more_restarts_never_leave_more_images():
    few, many = (attack(attacks=["square"], budget=Budget(12, 20, restarts=r)) for r in (1, 3))
    assert np.all(many.robust["square"] <= few.robust["square"])


def test_each_attack_alone_on_all_images(tmp_path):
    names = ["apgd-ce", "square"]
    result = attack(attacks=names, individually=True, workdir=tmp_path)
    alone = {name: attack(attacks=[name]).robust[name] for name in names}
    assert list(result.robust) == ["clean", *names, "all"]
    for name in names:
        np.testing.assert_array_equal(result.robust[name], alone[name])
    union = alone["apgd-ce"] & alone["square"]
    np.testing.assert_array_equal(result.robust["all"], union)
    np.testing.assert_array_equal(result.columns["worst_case_correct"], union)
    assert 0 < union.sum() < 16
    places = np.concatenate([some for some, _ in result.found()])
    np.testing.assert_array_equal(np.sort(places), np.flatnonzero(~union))
    again = attack(attacks=names, individually=True, workdir=tmp_path)
    np.testing.assert_array_equal(again.adversarial, result.adversarial)
    with pytest.raises(UserError, match="individually"):
        attack(attacks=names, workdir=tmp_path)


@pytest.mark.slow
@hypothesis_settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 100),
    norm=st.sampled_from([("linf", 0.05), ("l2", 0.3), ("l1", 1.0)]),
    name=st.sampled_from(["apgd-ce", "apgd-t", "square", "fab-t"]),
)
def test_the_worst_image_has_the_same_outcome_and_no_smaller_margin(seed, norm, name):
    norm, eps = norm
    options = {"norm": norm, "eps": eps, "attacks": [name]}
    first, worst = (attack(seed, keep=keep, **options) for keep in ("first", "worst"))
    np.testing.assert_array_equal(first.robust[name], worst.robust[name])
    assert not worst.failures
    params, _, labels = problem(seed)

    def loss(result):
        logits = network(params, result.adversarial)
        if name == "square":
            return losses.pick(logits, losses.best_wrong_class(logits, labels)) - losses.pick(
                logits, labels
            )
        return losses.cross_entropy(logits, jax.nn.one_hot(labels, CLASSES))

    if name in ("apgd-ce", "square"):  # attacks that raise this loss
        assert np.all(loss(worst) >= loss(first) - 1e-4)
    if name == "fab-t":
        np.testing.assert_array_equal(first.adversarial, worst.adversarial)


def test_a_ledger_knows_what_it_keeps(tmp_path):
    attack(attacks=["square"], workdir=tmp_path)
    with pytest.raises(UserError, match="keep 'first' -> 'worst'"):
        attack(attacks=["square"], workdir=tmp_path, keep="worst")
    changed = Budget(iterations=12, queries=60, restarts=2)
    with pytest.raises(UserError, match=r"restarts None -> 2"):
        attack(attacks=["square"], workdir=tmp_path, budget=changed)
