"""Our training step against the PyTorch reference, number by number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_steps as ref
import runs

from vit_at import models
from vit_at.configs import default
from vit_at.training.attack import perturb
from vit_at.training.objectives import training_loss
from vit_at.training.optim import make_optimizer

FULL_CASES = [c for c in ref.CASES if "delta_steps" in ref.arrays(f"train_{c}")]
SIGN_CASES = [c for c in ref.CASES if "attack_grad_sign" in ref.arrays(f"train_{c}")]


@functools.cache
def functions(objective: str, masked: bool, dtype: str):
    """(attack, one attack step, loss and gradient), each compiled once.

    With the parameters laid out as the training step lays them out.
    """
    del masked  # part of the key: the masks' presence changes the traced program
    apply = models.classifier(ref.model(dtype), ref.MEAN, ref.STD)
    one_step = ref.Threat("linf", ref.THREAT.eps, ref.THREAT.step_size, 1)

    def attack(threat, params, *rest):
        params = models.unstack_blocks(apply, params)
        return perturb(apply, params, *rest, objective=objective, threat=threat)

    def loss(params, *rest):
        params = models.unstack_blocks(apply, params)
        return training_loss(objective, apply, params, *rest, beta=6.0)

    attacks = (jax.jit(functools.partial(attack, threat)) for threat in (ref.THREAT, one_step))
    return *attacks, jax.jit(jax.value_and_grad(loss, has_aux=True))


def of_case(case: str, dtype: str):
    return functions(ref.objective(case), "ardprm" in case, dtype)


def normalised_delta(adversarial, images):
    return (np.asarray(adversarial) - np.asarray(images)) / np.array(ref.STD)


def optimizer():
    return make_optimizer(default.get_config(), steps_per_epoch=1000)


# The others are of their kinds.
SLOW = {"trades_ardprm", "trades_plain", "at_plain_cutmix", "mart_ardprm"}


@pytest.mark.parametrize("case", [runs.slow(c) if c in SLOW else c for c in ref.CASES])
def test_two_updates_in_float64(case):
    """Perturbations, losses, gradients, norms and parameters of two consecutive updates."""
    data = ref.arrays(f"train_{case}")
    with jax.enable_x64(True):
        attack, _, loss_and_gradient = of_case(case, "float64")
        images, targets = ref.batch(case, "float64")
        initial = params = ref.parameters("float64")
        chain = optimizer()
        update, opt_state = jax.jit(chain.update), chain.init(params)
        for step in range(2):
            adversarial = attack(params, images, targets, ref.draws(case, step, "float64"))
            final = {0: data.get("delta_steps", [None])[-1], 1: data.get("delta_final_step2")}[step]
            final = data["delta_final"][step] if "delta_final" in data else final
            delta = normalised_delta(adversarial, images)
            np.testing.assert_allclose(delta, final, atol=1e-6)

            (loss, aux), gradient = loss_and_gradient(params, images, adversarial, targets)
            np.testing.assert_allclose(loss, data["loss"][step], rtol=1e-9)
            np.testing.assert_allclose(aux["logits_adv"], data["logits_adv"][step], atol=1e-9)
            for ours, theirs in (
                ("natural", "term_natural"),
                ("robust", "term_robust"),
                ("ce_adv", "term_ce_adv"),
                ("margin", "term_margin"),
            ):
                if theirs in data:
                    np.testing.assert_allclose(aux[ours], data[theirs][step], rtol=1e-9)
            if "logits_clean" in data:
                clean = data["logits_clean"][step]
                np.testing.assert_allclose(aux["logits_clean"], clean, atol=1e-9)
            norm = optax.tree.norm(gradient)
            np.testing.assert_allclose(norm, data["grad_norm"][step], rtol=1e-9)
            prints = ref.fingerprint(ref.named(gradient))
            np.testing.assert_allclose(prints, data["fp_grad"][step], rtol=1e-9, atol=1e-9 * norm)

            updates, opt_state = update(gradient, opt_state, params)
            params = jax.tree.map(np.add, params, updates)
            prints = ref.fingerprint(ref.named(params))
            np.testing.assert_allclose(prints, data["fp_params_after"][step], rtol=1e-9, atol=1e-9)
        moved = ref.named(jax.tree.map(np.subtract, params, initial))
    for name, expected in data.items():
        if name.startswith("update2/"):
            error = np.linalg.norm(moved[name[8:]] - expected) / np.linalg.norm(expected)
            assert error < 3e-5, name


@pytest.mark.parametrize("case", [runs.slow(c) if c in SLOW else c for c in FULL_CASES])
def test_every_attack_step_in_float64(case):
    """Each attack step from the recorded perturbation before it, and the first gradient."""
    data = ref.arrays(f"train_{case}")
    with jax.enable_x64(True):
        _, step, loss_and_gradient = of_case(case, "float64")
        images, targets = ref.batch(case, "float64")
        params, draws = ref.parameters("float64"), ref.draws(case, 0, "float64")
        before = np.concatenate([data["delta_init"][None], data["delta_steps"][:-1]])
        for k, (start, after) in enumerate(zip(before, data["delta_steps"], strict=True)):
            at_k = draws._replace(
                delta=jnp.asarray(start.astype(np.float64) * ref.STD),
                attn_keep=None if draws.attn_keep is None else draws.attn_keep[k : k + 1],
                patch_keep=None if draws.patch_keep is None else draws.patch_keep[k : k + 1],
            )
            delta = normalised_delta(step(params, images, targets, at_k), images)
            # A sign of a gradient that is rounding noise may differ; none does in the others.
            wrong = np.mean(np.abs(delta - after) > 1e-6)
            assert wrong <= (2e-3 if k == 0 and case == "trades_plain" else 0), (k, wrong)
        adversarial = jnp.asarray(ref.pixels(data["x_adv"]))
        _, gradient = loss_and_gradient(params, images, adversarial, targets)
    for name, value in ref.named(gradient).items():
        expected = data[f"grad/{name}"]
        assert np.linalg.norm(value - expected) <= 5e-6 * np.linalg.norm(expected), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ref.CASES)
def test_float32(case):
    """Float32 at the measured distances; TRADES only from recorded perturbations."""
    data = ref.arrays(f"train_{case}")
    attack, step, loss_and_gradient = of_case(case, "float32")
    images, targets = ref.batch(case, "float32")
    params, draws = ref.parameters("float32"), ref.draws(case, 0, "float32")
    if ref.objective(case) == "trades":
        recorded = data["delta_steps"][0].astype(np.float64) * ref.STD
        second = draws._replace(
            delta=jnp.asarray(recorded, jnp.float32),
            attn_keep=None if draws.attn_keep is None else draws.attn_keep[1:2],
            patch_keep=None if draws.patch_keep is None else draws.patch_keep[1:2],
        )
        delta = normalised_delta(step(params, images, targets, second), images)
        assert np.mean(np.abs(delta - data["delta_steps"][1]) > 1e-5) <= 1e-3
    else:
        delta = normalised_delta(attack(params, images, targets, draws), images)
        final = data["delta_final"][0] if "delta_final" in data else data["delta_steps"][-1]
        assert np.mean(np.abs(delta - final) > 1e-5) <= 1e-3
    if "x_adv" not in data:
        return
    adversarial = jnp.asarray(ref.pixels(data["x_adv"]), jnp.float32)
    (loss, _), gradient = loss_and_gradient(params, images, adversarial, targets)
    np.testing.assert_allclose(loss, data["loss"][0], rtol=1e-5)
    ours = np.concatenate([v.ravel() for v in ref.named(gradient).values()])
    theirs = np.concatenate([data[f"grad/{n}"].ravel() for n in ref.named(gradient)])
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 5e-4
