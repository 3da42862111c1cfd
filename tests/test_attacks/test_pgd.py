"""PGD and CW evaluation against the reference's recorded runs (tests/data/steps/eval.npz)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_steps as ref

from vit_at import models
from vit_at.attacks import Threat, losses, pgd_attack
from vit_at.attacks.norms import NORMS, largest_size, sizes

META = json.loads(str(ref.arrays("eval")["meta"]))


def recorded(case):
    prefix = f"{case}/"
    return {
        n.removeprefix(prefix): v for n, v in ref.arrays("eval").items() if n.startswith(prefix)
    }


def images():
    return jnp.asarray(ref.arrays("model")["images"] / np.float64(255))


def parameters(case):
    params = ref.parameters("float64")
    scale = META[case]["head_scale"]
    return params | {"head": jax.tree.map(lambda x: x * scale, params["head"])}


@functools.cache
def attack(loss):
    """(params, images, labels, starts, eps, step size) -> (adversarial, logits), jitted."""
    apply = models.classifier(ref.model("float64"), ref.MEAN, ref.STD)

    @jax.jit
    def run(params, images, labels, init, eps, step_size):
        def logits_fn(x):
            return apply(params, x)

        threat = Threat("linf", eps, step_size, 10)
        adversarial = pgd_attack(logits_fn, images, labels, None, threat, loss=loss, init=init)
        return adversarial, logits_fn(adversarial)

    return run


def run_case(case, restarts):
    """Perturbation in the reference's units and logits, with these of the recorded starts."""
    meta = META[case]
    eps, step_size = meta["eps_255"] / 255, meta["alpha_255"] / 255
    init = jnp.asarray(ref.arrays("eval")["init_unit"][restarts].astype(np.float64) * eps)
    loss = {"pgd": "ce", "cw": "cw"}[meta["attack"]]
    labels = jnp.asarray(recorded(case)["labels"])
    adversarial, logits = attack(loss)(parameters(case), images(), labels, init, eps, step_size)
    return np.asarray(adversarial - images()) / np.array(ref.STD), np.asarray(logits)


@pytest.mark.parametrize("case", META)
def test_each_restart_ends_where_the_references_does(case):
    data = recorded(case)
    with jax.enable_x64(True):
        for restart in range(META[case]["restarts"]):
            delta, logits = run_case(case, slice(restart, restart + 1))
            np.testing.assert_allclose(logits, data["logits_end"][restart], atol=1e-8)
            theirs = data["chosen_restart"] == restart
            np.testing.assert_allclose(delta[theirs], data["delta"][theirs], atol=1e-6)


@pytest.mark.parametrize("case", [c for c in META if META[c]["restarts"] > 1])
def test_restarts_keep_a_success_and_otherwise_the_highest_loss(case):
    """Ours: the first success. (The reference takes the highest loss, so it can lose a success.)"""
    data = recorded(case)
    with jax.enable_x64(True):
        delta, logits = run_case(case, slice(None))
    success = data["logits_end"].argmax(-1) != data["labels"]
    chosen = np.where(success.any(0), success.argmax(0), data["restart_loss"].argmax(0))
    expected = np.take_along_axis(data["logits_end"], chosen[None, :, None], 0)[0]
    np.testing.assert_allclose(logits, expected, atol=1e-8)
    same = chosen == data["chosen_restart"]
    assert same.any() or "allwrong" in case
    np.testing.assert_allclose(delta[same], data["delta"][same], atol=1e-6)


@pytest.mark.parametrize("case", META)
def test_accuracy_is_the_references(case):
    data = recorded(case)
    with jax.enable_x64(True):
        _, logits = run_case(case, slice(0, META[case]["restarts"]))
    correct = logits.argmax(-1) == data["labels"]
    np.testing.assert_array_equal(correct, data["final_correct"].astype(bool))
    assert correct.mean() == data["accuracy"]


def test_cw_margin_and_its_gradient_are_the_references():
    data = recorded("cw_unit")
    labels = jnp.asarray(data["labels"])
    with jax.enable_x64(True):
        logits = jnp.asarray(data["logits"])
        np.testing.assert_allclose(losses.cw_margin(logits, labels), data["loss"], atol=1e-12)
        gradient = jax.grad(lambda z: losses.cw_margin(z, labels).mean())(logits)
        np.testing.assert_allclose(gradient, data["grad_of_mean"], atol=1e-12)
    assert (data["loss"] == losses.CW_FLOOR).any()


# --- A linear model, whose best perturbation is known -----------------------------------------

WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_results_stay_in_the_ball_and_in_the_image_range(norm, loss):
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(12, 4, 4, 1)), jnp.float32)
    labels = jnp.argmax(linear(x), -1)
    threat = Threat(norm, 0.3, 0.1, 7)
    adversarial = pgd_attack(linear, x, labels, jax.random.key(0), threat, loss=loss, restarts=2)
    delta = np.asarray(adversarial - x).reshape(12, -1)
    size = np.abs(delta).max(1) if norm == "linf" else np.sqrt((delta**2).sum(1))
    assert np.all(size <= 0.3 * (1 + 1e-5))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    still = jnp.mean(jnp.argmax(linear(adversarial), -1) == labels)
    assert still < 1


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize(
    ("images", "logits", "found"),
    [
        ("float16", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float32", "float64", "float32"),
        ("float64", "float32", "float64"),
    ],
)
def test_restarts_take_any_precision_and_are_at_least_float32(images, logits, found, loss):
    with jax.enable_x64("float64" in (images, logits)):
        x = jnp.asarray(np.random.default_rng(1).uniform(size=(12, 4, 4, 1)), images)
        labels, threat = jnp.argmax(linear(x), -1), Threat(eps=0.1, step_size=0.03)

        def model(x):
            return linear(x).astype(logits)

        options = {"loss": loss, "restarts": 2}
        adversarial = pgd_attack(model, x, labels, jax.random.key(0), threat, **options)
        assert adversarial.dtype == found
        assert float(jnp.abs(adversarial - x).max()) <= 0.1 * (1 + 1e-5)
        assert float(losses.is_correct(model(adversarial), labels).mean()) < 0.9


def test_an_example_that_is_wrong_from_the_start_is_not_moved():
    x = jnp.full((4, 4, 4, 1), 0.5)
    wrong = (jnp.argmax(linear(x), -1) + 1) % 3
    start = jnp.full((1, 4, 4, 4, 1), 0.01)
    adversarial = pgd_attack(linear, x, wrong, None, Threat(eps=0.1), init=start)
    np.testing.assert_allclose(adversarial, 0.51, rtol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3), ("l1", 1.0)])
def test_starts_outside_of_the_ball_are_projected(norm, eps):
    """Of wrong examples, which are not moved, and right ones."""
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(12, 4, 4, 1)), jnp.float32)
    labels = jnp.argmax(linear(x), -1).at[:6].add(1) % 3
    starts = np.random.default_rng(2).normal(size=(2, *x.shape))
    adversarial = pgd_attack(linear, x, labels, None, Threat(norm, eps), init=starts)
    assert np.all(sizes(np.asarray(adversarial - x), norm) <= largest_size(eps, 16, norm))
    assert 0 <= adversarial.min() <= adversarial.max() <= 1


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.8)])
def test_the_default_step_reaches_the_edge_of_any_ball(norm, eps):
    """Of a model that no perturbation fools, so that every step is taken."""

    def never_fooled(images):
        return linear(images) / 100 + jnp.array([10, 0, 0])

    x = jnp.full((4, 4, 4, 1), 0.5)
    labels, start = jnp.zeros(4, int), jnp.zeros((1, *x.shape))
    adversarial = pgd_attack(never_fooled, x, labels, None, Threat(norm, eps), init=start)
    np.testing.assert_allclose(sizes(np.asarray(adversarial - x), norm), eps, rtol=1e-4)


def test_more_restarts_never_leave_more_images_correct():
    x = jnp.asarray(np.random.default_rng(2).uniform(size=(64, 4, 4, 1)), jnp.float32)
    labels = jnp.argmax(linear(x), -1)
    starts = 0.05 * jax.random.uniform(jax.random.key(0), (5, *x.shape), minval=-1.0)
    accuracies = []
    for restarts in (1, 2, 5):
        adversarial = pgd_attack(
            linear,
            x,
            labels,
            None,
            Threat(eps=0.05, step_size=0.01, steps=1),
            init=starts[:restarts],
        )
        accuracies.append(float(jnp.mean(jnp.argmax(linear(adversarial), -1) == labels)))
    assert accuracies == sorted(accuracies, reverse=True)


def test_an_unknown_loss_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="use one of ce, cw"):
        pgd_attack(linear, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, int), None, Threat(), loss="dlr")


@pytest.mark.parametrize("xp", [np, jnp])
def test_only_finite_logits_can_be_correct(xp):
    nan, inf = np.nan, np.inf
    logits = [[2, 1, 0], [1, 2, 0], [nan] * 3, [2, nan, 0], [inf, 0, 0], [0, 0, -inf]]
    found = losses.is_correct(xp.asarray(logits, np.float32), xp.zeros(6, int), xp)
    np.testing.assert_array_equal(found, [True, False, False, False, False, False])
