"""The audit raises a flag for a model with the fault it is about, and none for a sound one."""

import dataclasses
import functools
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_autoattack as reference
from test_autoattack import attack, linear, median_eps, problem

from vit_at.attacks import autoattack
from vit_at.attacks.autoattack import audit
from vit_at.attacks.autoattack.flags import MEANING
from vit_at.errors import UserError

PARAMS, IMAGES, LABELS = problem(16)
EPS = median_eps(PARAMS, IMAGES, LABELS, "linf")
MODEL = functools.partial(linear, PARAMS)
SETTINGS = autoattack.Settings(eps=EPS, batch_size=16)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(audit, "CURVE_EPS", (1.0,))
    monkeypatch.setattr(audit, "CURVE_STEPS", (5, 20))


def run(model=MODEL, evaluated=SETTINGS, **options):
    return audit.audit(model, IMAGES, LABELS, evaluated, **options)


def test_a_sound_model_raises_no_flag(short):
    result = attack(PARAMS, IMAGES, LABELS, eps=EPS, batch_size=16)
    found = run(evaluated=result, surrogates={"itself": result.adversarial})
    assert found.flags == {}
    assert found.summary() == "no flags by the audit"
    assert result.flags == {}
    curve = list(found.eps_curve.values())
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == 0
    assert set(found.record()) == {"flags", "eps_curve", "steps_curve"}


@pytest.mark.slow
def test_the_audit_takes_what_autoattack_takes(short):
    """A pair (module, variables) and rows by their places, as any evaluation of a linen module."""

    class Rows:
        shape, dtype = IMAGES.shape, IMAGES.dtype

        def __getitem__(self, places):
            return IMAGES[np.asarray(places, int)]

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(x.reshape(len(x), -1))

    kernel, bias = PARAMS
    pair = (Linear(), {"params": {"Dense_0": {"kernel": kernel, "bias": bias}}})
    options = {"eps": EPS, "attacks": ["apgd-ce"], "batch_size": 16}
    result = autoattack.run(pair, Rows(), list(LABELS), **options)
    surrogates = {"itself": result.adversarial}
    found = audit.audit(pair, Rows(), list(LABELS), result, surrogates=surrogates)
    assert found.flags == {}
    assert found.eps_curve[EPS] == result.robust["apgd-ce"].mean()


def test_the_audit_of_a_randomised_evaluation_is_refused():
    def noisy(x, key):
        return MODEL(x) + jax.random.normal(key, (len(x), 5))

    with pytest.raises(UserError, match="attacks is 'rand', but the audit takes no randomised"):
        run(noisy, dataclasses.replace(SETTINGS, attacks="rand"))


def test_the_audit_attacks_in_the_precision_of_the_evaluation(short, monkeypatch):
    """On a CPU there is one precision, so the attacks are replaced."""
    within = []

    def attacked(*args, precision, **options):
        within.append((precision, jax.config.jax_default_matmul_precision))
        return types.SimpleNamespace(robust={"apgd-ce": np.ones(len(LABELS), bool)})

    monkeypatch.setattr(audit, "check_precision", lambda *args: None)
    monkeypatch.setattr(audit.autoattack, "run", attacked)
    monkeypatch.setattr(audit, "_logits", lambda *args: np.zeros((len(LABELS), 5)))
    monkeypatch.setattr(audit, "check_function", lambda *args: {})
    run(evaluated=dataclasses.replace(SETTINGS, precision="bf16x9"))
    assert set(within) == {("bf16x9", "BF16_BF16_F32_X9")}


def test_a_precision_that_the_devices_lack_is_refused():
    with pytest.raises(UserError, match="precision is 'bf16x9'"):
        run(evaluated=dataclasses.replace(SETTINGS, precision="bf16x9"))


def test_randomised():
    counter = iter(range(100))
    flags = run(lambda x: MODEL(x) + next(counter)).flags
    assert list(flags) == ["randomised"]
    options = {"eps": EPS, "attacks": ["fab"], "budget": autoattack.Budget(iterations=1)}
    result = autoattack.run(lambda x: MODEL(x) + next(counter), IMAGES, LABELS, **options)
    assert list(result.flags) == ["randomised"]
    assert run(evaluated=result).flags == {}


def check(model):
    return audit.check_function(model, IMAGES, LABELS, SETTINGS)


def test_probabilities():
    assert "probabilities" in check(lambda x: jax.nn.softmax(MODEL(x)))
    assert "probabilities" not in check(MODEL)


def test_zero_gradients():
    assert "zero-gradients" in check(lambda x: MODEL(jnp.round(x * 255) / 255))


def test_saturated_softmax(short):
    flags = run(lambda x: 1e5 * MODEL(x)).flags
    assert "saturated-softmax" in flags
    assert "zero-gradients" not in flags
    assert "losses-disagree" in flags


@pytest.mark.slow
def test_robust_at_any_eps(short):
    always = jax.nn.one_hot(LABELS[-1], 5)
    flags = run(lambda x: jnp.tile(always, (len(x), 1)) + 0 * x.sum()).flags
    assert "robust-at-any-eps" in flags


def test_more_steps():
    flags = audit.judge_curves({0.0: 0.9, 1.0: 0.0}, {5: 0.3, 20: 0.25, 100: 0.35}, 100)
    assert list(flags) == ["more-steps-weaker"]
    assert audit.judge_curves({0.0: 0.9, 1.0: 0.0}, {5: 0.3, 20: 0.25, 100: 0.26}, 100) == {}


def test_square_and_transfer_win_over_a_masked_gradient():
    """Rounding hides the gradient: white-box attacks fail, Square and transfer do not."""

    def rounded(params, x):
        return linear(params, jnp.round(x * 255) / 255)

    options = {"eps": EPS, "attacks": ["apgd-ce", "square"], "batch_size": 16}
    masked = functools.partial(rounded, PARAMS)
    result = autoattack.run(
        masked, IMAGES, LABELS, **options, budget=autoattack.Budget(iterations=5, queries=200)
    )
    assert "square-wins" in result.flags
    assert "flag square-wins" in result.summary()
    assert "square-wins" not in audit.audit(masked, IMAGES, LABELS, result).flags  # not twice
    options = {"eps": EPS, "attacks": ["apgd-ce"], "budget": autoattack.Budget(iterations=5)}
    blind = autoattack.run(masked, IMAGES, LABELS, **options)
    surrogate = attack(PARAMS, IMAGES, LABELS, eps=EPS, attacks=["apgd-t"])
    flags = audit.judge_transfer(masked, LABELS, blind, {"linear": surrogate.adversarial})
    assert "transfer-wins" in flags


def test_every_flag_is_documented():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    for name in MEANING:
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        for part in ("Raised if", "What it means", "What to do"):
            assert f"**{part}**" in section


@pytest.mark.slow
def test_the_masked_reference_model():
    """Logits times 1000: 36 of 128 clean images officially have no CE gradient; starts may add."""
    images, labels = (np.asarray(x)[:128] for x in reference.images())
    params, classify = reference.parameters(), reference.apply()
    scaled = functools.partial(lambda p, x: 1000 * classify(p, x), params)
    flags = audit.check_function(scaled, images, labels, autoattack.Settings(batch_size=128))
    assert "zero-gradients" not in flags
    recorded = reference.arrays("masked")
    count, _, of = flags["saturated-softmax"].partition(" of ")
    assert 0 <= int(count) - recorded["scale1000_ce_zero_grad"].sum() <= 2
    assert of.startswith(f"{recorded['scale1000_clean_correct'].sum()} correct images")
