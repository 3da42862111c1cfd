"""AutoAttack as a whole, on classifiers whose exact robustness is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problem import SHAPE, SHORT, attack, exact_distance, linear, median_eps, problem

from vit_at.attacks import Threat, autoattack, losses, pgd_attack
from vit_at.attacks.autoattack import Budget, audit, cascade
from vit_at.attacks.autoattack import settings as autoattack_settings
from vit_at.attacks.autoattack.ledger import BROKEN, NOT_ATTACKED
from vit_at.attacks.norms import largest_size
from vit_at.data.examples import Examples
from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store
from vit_at.evaluation.protocol import parse_attacks
from vit_at.workdir import results

CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 5, "fab": 5, "fab-t": 5}
QUICK = {"apgd-ce": "l2", "apgd-dlr": "linf", "apgd-t": "l1", "fab": "linf", "fab-t": "l2"}


@pytest.mark.parametrize(
    ("name", "num_classes", "norm"),
    [
        (name, classes, norm) if norm == QUICK[name] else runs.slow(name, classes, norm)
        for name, classes in CLASSES.items()
        for norm in ("linf", "l2", "l1")
    ],
)
def test_exact_robust_accuracy_of_a_linear_classifier(name, num_classes, norm):
    """Untargeted losses climb towards several classes at once, so they are exact with few."""
    params, images, labels = problem(num_classes=num_classes)
    eps = median_eps(params, images, labels, norm)
    result = attack(params, images, labels, norm=norm, eps=eps, attacks=[name], budget=Budget(40))
    expected = exact_distance(params, images, labels, norm) > eps
    np.testing.assert_array_equal(result.robust[name], expected)
    assert not result.failures


@pytest.mark.parametrize("version", ["standard"])
def test_cascade(version):
    params, images, labels = problem()
    eps = median_eps(params, images, labels, "linf")
    result = attack(params, images, labels, eps=eps, attacks=version)
    expected = exact_distance(params, images, labels, "linf") > eps
    assert tuple(result.robust) == ("clean", *autoattack_settings.VERSIONS[version])
    np.testing.assert_array_equal(result.robust["clean"], np.arange(24) >= 3)
    np.testing.assert_array_equal(result.robust["square"], expected)
    outcome = result.columns["outcome"]
    assert np.all(outcome[:3] == NOT_ATTACKED)
    assert np.all((outcome == BROKEN).sum(1) == (result.columns["broken_by"] >= 0))
    untouched = np.flatnonzero(result.columns["broken_by"] < 0)
    np.testing.assert_array_equal(result.adversarial[untouched], images[untouched])
    assert "square" in result.summary()


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.floats(0.005, 0.6),
)
def test_adversarial_images_stay_in_the_ball_and_the_image_range(seed, norm, eps):
    params, images, labels = problem(8, seed=seed)
    images = np.clip(3 * images - 1, 0, 1)  # many at the bounds
    options = {"norm": norm, "eps": eps, "attacks": "plus", "budget": Budget(6, 30)}
    result = attack(params, images, labels, **options)
    delta = (result.adversarial - images).reshape(8, -1).astype(np.float64)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    assert np.linalg.norm(delta, order, axis=1).max() <= largest_size(eps, 32, norm)
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert not result.failures
    assert not any(work["unconfirmed"] for work in result.work.values())
    wrong = np.asarray(linear(params, result.adversarial)).argmax(1) != labels
    np.testing.assert_array_equal(wrong, ~list(result.robust.values())[-1])


GAP = 0.1  # the model below answers NaN if the two largest logits are closer


def abstaining(params, images):
    """A linear classifier that answers NaN near its boundaries."""
    logits = linear(params, images)
    largest = jax.lax.top_k(logits, 2)[0]
    return jnp.where((largest[:, 0] - largest[:, 1] < GAP)[:, None], jnp.nan, logits)


def sure_problem(num_classes):
    """``problem`` with the images that ``abstaining`` classifies, all correctly."""
    params, images, _ = problem(64, num_classes)
    logits = np.asarray(abstaining(params, images))
    sure = np.isfinite(logits).all(1)
    return params, images[sure], logits[sure].argmax(1)


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [("pgd", 2), ("apgd-ce", 2), ("apgd-dlr", 3), ("apgd-t", 5), ("fab", 3), ("fab-t", 5)],
)
def test_an_image_is_broken_where_the_model_answers_nan(name, num_classes):
    params, images, labels = sure_problem(num_classes)
    kernel, _ = params
    # The label's logit as much smaller: what is left of the margin before the answer is NaN.
    lowered = np.asarray(linear(params, images)) - GAP * np.eye(num_classes)[labels]
    bias_of_image = lowered - np.asarray(linear((kernel, 0.0), images))
    distances = exact_distance((kernel, bias_of_image), images, labels, "linf")
    eps = float(np.median(distances))
    if name == "pgd":
        threat = Threat("linf", eps, eps / 4, 20)
        attacked = pgd_attack(
            functools.partial(abstaining, params), images, labels, jax.random.key(0), threat
        )
        found = losses.is_correct(abstaining(params, attacked), labels)
    else:
        logits_fn = functools.partial(abstaining, params)
        options = {"eps": eps, "attacks": [name], "batch_size": 8, "budget": Budget(60)}
        result = autoattack.run(logits_fn, images, labels, **options)
        assert not result.failures
        found = result.robust[name]
    assert found[distances > 1.001 * eps].all()
    assert not found[distances < 0.8 * eps].any()  # FAB, for one, overshoots the edge


def test_square_counts_nan_as_a_success():
    params, images, labels = sure_problem(5)
    options = {"eps": 0.4, "attacks": ["square"], "batch_size": 8, **SHORT}
    result = autoattack.run(functools.partial(abstaining, params), images, labels, **options)
    logits = np.asarray(abstaining(params, result.adversarial))
    broken = ~result.robust["square"]
    assert np.isnan(logits[broken]).any()
    assert np.isfinite(logits[~broken]).all()
    assert not result.failures


def test_square_goes_on_at_a_tie_that_is_correct():
    """The label has the lower index, so that it wins where both logits are equal."""

    def coarse(images):  # 0 from a mean of 0.5 to 0.53, and positive above
        other = jnp.floor((images.mean((1, 2, 3)) - 0.5) / 0.03)
        return jnp.stack([jnp.zeros_like(other), other], 1)

    images, labels = np.full((8, 4, 4, 1), 0.5, np.float32), np.zeros(8, int)
    options = {"eps": 0.05, "attacks": ["square"], "batch_size": 8, **SHORT}
    result = autoattack.run(coarse, images, labels, **options)
    assert result.robust["clean"].all()
    assert not result.robust["square"].any()
    assert result.work["square"]["unconfirmed"] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("name", ["fab", "square"])
def test_logits_may_be_of_any_precision(name, dtype):
    """Their scans hold float32."""
    with jax.enable_x64(dtype == jnp.float64):
        params, images, labels = problem()
        eps = median_eps(params, images, labels, "linf")
        model = functools.partial(lambda params, x: linear(params, x).astype(dtype), params)
        options = {"eps": 2 * eps, "attacks": [name], "batch_size": 8, **SHORT}
        result = autoattack.run(model, images.astype(np.float32), labels, **options)
        broken = ~result.robust[name]
        correct = losses.is_correct(np.asarray(model(result.adversarial)), labels, np)
    np.testing.assert_array_equal(correct, ~broken)
    assert broken[3:].mean() > 0.5
    assert not result.failures


def test_an_unconfirmed_success_continues_with_the_next_run(monkeypatch):
    params, images, labels = problem()
    eps = median_eps(params, images, labels, "linf")
    options = {"eps": eps, "attacks": ["apgd-t"]}
    undisturbed = attack(params, images, labels, **options)
    refused = []

    def flaws_once(self, places, points, outside, draw):
        found = true_flaws(self, places, points, outside, draw)
        fresh = [int(place) for place in places if np.ndim(draw) == 0 and int(place) not in refused]
        refused.extend(fresh)
        return found | dict.fromkeys(fresh, "refused by the test")

    true_flaws = cascade.Cascade._flaws
    monkeypatch.setattr(cascade.Cascade, "_flaws", flaws_once)
    result = attack(params, images, labels, **options)
    broken = ~undisturbed.robust["apgd-t"] & undisturbed.robust["clean"]
    assert result.work["apgd-t"]["unconfirmed"] == broken.sum() == len(refused)
    later = result.columns["run"] > undisturbed.columns["run"]
    again = broken & ~result.robust["apgd-t"]
    assert again.any()
    assert np.all(later[again])
    assert result.flags.keys() == {"unconfirmed"}
    assert not undisturbed.flags


@pytest.mark.slow
def test_few_classes():
    for num_classes, expected in ((3, "apgd-dlr"), (2, "fab-t")):
        params, images, labels = problem(8, num_classes)
        eps = median_eps(params, images, labels, "linf")
        result = attack(params, images, labels, eps=eps, budget=Budget(30, 300))
        assert expected in result.robust
        assert result.notes
        exact = exact_distance(params, images, labels, "linf") > eps
        np.testing.assert_array_equal(result.robust["square"], exact)


@pytest.mark.slow
def test_randomised_model():
    params, images, labels = problem(8)

    def noisy(params, images, key):
        kernel, bias = params
        return linear((kernel + 0.01 * jax.random.normal(key, kernel.shape), bias), images)

    eps = median_eps(params, images, labels, "linf")
    model = functools.partial(noisy, params)
    options = {"attacks": "rand", "budget": Budget(iterations=8)}
    run = functools.partial(autoattack.run, model, images, labels, **options)
    first, second = run(eps=eps, batch_size=8), run(eps=eps, batch_size=16)
    assert tuple(first.robust) == ("clean", "apgd-ce", "apgd-dlr")
    np.testing.assert_array_equal(first.adversarial, second.adversarial)
    exact = exact_distance(params, images, labels, "linf")
    assert not first.robust["apgd-dlr"][exact < 0.5 * eps].any()
    assert first.robust["apgd-dlr"][exact > 2 * eps].all()


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_a_randomised_model_draws_by_image_not_by_batch(noise, tmp_path):
    """Clean and robust images are the same for each batch size, and every success is verified."""
    params, images, labels = problem(24)

    def noisy(params, images, key):
        return linear(params, images) + noise * jax.random.normal(key, (len(images), 5))

    options = {"eps": median_eps(params, images, labels, "linf"), "attacks": "rand"}
    options |= {"budget": Budget(iterations=6, samples=2)}
    run = functools.partial(autoattack.run, functools.partial(noisy, params), images, labels)
    small, large = (run(**options, batch_size=size) for size in (8, 24))
    assert 0 < small.robust["clean"].sum() < (25 if noise < 0.1 else 24)
    for attack_name, robust in small.robust.items():
        np.testing.assert_array_equal(robust, large.robust[attack_name])
    np.testing.assert_array_equal(small.adversarial, large.adversarial)
    assert small.failures == large.failures == {}
    stored = run(**options, batch_size=8, workdir=tmp_path)
    resumed = run(**options, batch_size=24, workdir=tmp_path)
    assert resumed.failures == stored.failures == {}
    np.testing.assert_array_equal(resumed.robust["apgd-dlr"], small.robust["apgd-dlr"])


GOOD = problem(8)


def batch_norm(params, images):
    logits = linear(params, images)
    return logits - logits.mean(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": 255 * GOOD[1]}, "must be in \\[0, 1\\]"),
        ({"images": np.full_like(GOOD[1], np.nan)}, "must be in \\[0, 1\\]"),
        ({"images": GOOD[1][0]}, "must be \\[N, H, W, C\\]"),
        ({"images": (255 * GOOD[1]).astype(np.uint8)}, "divide them by 255"),
        ({"labels": GOOD[2] + 4}, "but the model has classes 0 to 4"),
        ({"labels": GOOD[2] - 9}, "but the model has classes 0 to 4"),
        ({"labels": GOOD[2][:3]}, "one integer for each"),
        ({"labels": GOOD[2].astype(float)}, "one integer for each"),
        ({"eps": 0.0}, "must be over 0"),
        ({"eps": -0.1}, "must be over 0"),
        ({"eps": 8.0}, "8/255, say, not 8"),
        ({"eps": float("nan")}, "must be over 0"),
        ({"norm": "l2", "eps": 6.0}, "at most 5.65685"),
        ({"norm": "l2", "eps": float("inf")}, "at most 5.65685"),
        ({"norm": "l3"}, "use one of linf, l2, l1"),
        ({"norm": "l1", "eps": 33.0}, "at most 32"),
        ({"attacks": "standrad"}, "nearest: standard"),
        ({"attacks": ["fab", "fab"]}, "each named once"),
        ({"attacks": "rand"}, "can't be called with \\(images, key\\)"),
        ({"batch_size": 0}, "must be an integer, 1 or more"),
        ({"batch_size": 6}, "do not divide"),
        ({"budget": Budget(iterations=0)}, "iterations is 0; it must be an integer, 1 or more"),
        ({"logits_fn": lambda x: linear(GOOD[0], x) * jnp.nan}, "NaN or infinity for 8 of 8"),
        ({"logits_fn": functools.partial(batch_norm, GOOD[0])}, "inference mode"),
        ({"logits_fn": lambda x: linear(GOOD[0], x)[:, 0]}, "must give logits"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, said):
    params, images, labels = GOOD
    logits_fn = functools.partial(linear, params)
    arguments = {"logits_fn": logits_fn, "images": images, "labels": labels, "batch_size": 8}
    with pytest.raises(UserError, match=said) as raised:
        autoattack.run(**(arguments | SHORT | change))
    assert "\n" not in str(raised.value)


class Lazy:
    """Images that are decoded when asked for, and count how many are at a time."""

    dtype = np.dtype(np.float32)

    def __init__(self, images):
        self.shape, self.most, self._images = images.shape, 0, images

    def __getitem__(self, places):
        self.most = max(self.most, len(places))
        return self._images[places]


def test_images_are_read_a_batch_at_a_time(tmp_path):
    params, images, labels = problem(64)
    eps = median_eps(params, images, labels, "linf")
    lazy = Lazy(images)
    result = attack(params, lazy, labels, eps=eps, workdir=tmp_path)
    assert lazy.most <= 8
    whole = attack(params, images, labels, eps=eps)
    np.testing.assert_array_equal(result.adversarial, whole.adversarial)
    broken = (whole.columns["broken_by"] >= 0).sum()
    assert sum(len(places) for places, _ in result.found()) == broken
    assert len(list(tmp_path.glob("adversarial_*.npz"))) > 1


@pytest.mark.slow
def test_through_the_evaluator(tmp_path, monkeypatch):
    """One record with the cascade and the audit; a ledger in the work directory."""
    params, images, labels = problem(8)
    pixels = np.round(images * 255).astype(np.uint8)
    examples = Examples(
        "digits",
        tuple("abcde"),
        SHAPE,
        np.arange(8),
        np.arange(8),
        lambda i: (pixels[i], labels[i]),
    )
    monkeypatch.setitem(autoattack_settings.VERSIONS, "standard", ("apgd-ce", "square"))
    monkeypatch.setattr(audit, "CURVE_EPS", ())
    monkeypatch.setattr(audit, "CURVE_STEPS", (10,))
    run = autoattack.run
    monkeypatch.setattr(autoattack, "run", lambda *a, **k: run(*a, **(SHORT | k)))
    attacks = parse_attacks("autoattack", Threat("linf", 0.05))
    mesh = sharding.make_mesh()
    evaluator = Evaluator(linear, examples, attacks, mesh, batch_size=8, seed=0)
    store = results.Results(epath.Path(tmp_path))
    (entry,) = evaluate_and_store(evaluator, params, examples, store, seed=0, weights={})
    assert entry["accuracy"] == entry["cascade"]["square"]
    assert set(entry["audit"]) == {"flags", "eps_curve", "steps_curve"}
    assert np.isclose(entry["audit"]["eps_curve"][0][1], entry["cascade"]["clean"])
    assert "autoattack" in results.as_text(results.Results(epath.Path(tmp_path)).records)
    assert list(tmp_path.glob("autoattack/*/per_example.npz"))
