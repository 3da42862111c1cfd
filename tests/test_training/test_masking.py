"""ARD and PRM: the recorded schedule, evaluated as training does, and statistics of the draws."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at.configs import default
from vit_at.training.masking import (
    Masking,
    draw_attn_keep,
    draw_patch_keep,
    keep_probability,
    num_masked_patches,
)

with np.load(pathlib.Path(__file__).parents[1] / "data" / "steps" / "schedule.npz") as _archive:
    RECORDED = dict(_archive)
SETS = sorted({name.split("/")[0] for name in RECORDED})


@pytest.mark.parametrize("name", SETS)
def test_keep_probability_and_masked_patches_of_every_step_are_the_references(name):
    """Inside jit and in float32, from the traced step, as in the training step."""
    recorded = {key: RECORDED[f"{name}/{key}"] for key in ("keep_rate", "n_zeroed_of_64")}
    per_epoch = int(RECORDED[f"{name}/steps_per_epoch"])
    masking = Masking(
        warmup_epochs=float(RECORDED[f"{name}/n_w"]), keep_max=float(RECORDED[f"{name}/drop_rate"])
    )

    @jax.jit
    def of_step(step):
        probability = keep_probability(masking, (step + 1) / per_epoch)
        return probability, num_masked_patches(64, probability)

    steps = jnp.arange(len(recorded["keep_rate"]), dtype=jnp.int32)
    probabilities, masked = zip(*map(of_step, steps), strict=True)
    assert probabilities[0].dtype == jnp.float32
    np.testing.assert_allclose(probabilities, recorded["keep_rate"], rtol=1e-6)
    np.testing.assert_array_equal(masked, recorded["n_zeroed_of_64"])


@pytest.mark.parametrize("num_patches", [16, 64, 196])
@pytest.mark.parametrize("per_epoch", [7, 100, 781])
def test_masked_patches_are_those_of_exact_arithmetic_at_any_epoch_length(num_patches, per_epoch):
    """int(P (1 - t / warmup)) in whole numbers, for every step of a 10-epoch warm-up."""
    masking = Masking(warmup_epochs=10.0)
    steps = jnp.arange(10 * per_epoch)

    @jax.jit
    def masked(step):
        return num_masked_patches(num_patches, keep_probability(masking, (step + 1) / per_epoch))

    exact = num_patches * (10 * per_epoch - (np.arange(10 * per_epoch) + 1)) // (10 * per_epoch)
    np.testing.assert_array_equal(jax.vmap(masked)(steps), exact)


def test_without_warm_up_the_keep_probability_is_its_maximum():
    assert keep_probability(Masking(warmup_epochs=0.0, keep_max=0.7), 0.01) == pytest.approx(0.7)


def test_masking_takes_the_models_patch_unless_it_has_its_own():
    options = default.get_config().masking
    assert Masking.of(options, 4).patch_size == 4
    with options.unlocked():
        options.patch_size = 8
    assert Masking.of(options, 4).patch_size == 8


@pytest.mark.parametrize(("probability", "masked"), [(0.0, 64), (0.325, 43), (0.99, 0), (1.0, 0)])
def test_each_step_masks_exactly_that_many_patches(probability, masked):
    keep = draw_patch_keep(jax.random.key(0), 10, (8, 8), jnp.float32(probability))
    assert keep.shape == (10, 8, 8)
    assert keep.dtype == bool
    np.testing.assert_array_equal((~keep).sum(axis=(1, 2)), masked)


def test_patches_are_masked_uniformly_and_independently_between_steps():
    steps, patches, probability = 4000, 16, 0.5
    keep = draw_patch_keep(jax.random.key(1), steps, (4, 4), jnp.float32(probability))
    kept = np.asarray(keep).reshape(steps, patches)
    # A frequency of 4 000 draws has standard deviation 0.008.
    np.testing.assert_allclose(kept.mean(axis=0), probability, atol=0.035)
    # Neighbouring steps: correlation 0; two patches of a step: -1 / (P - 1), as 8 of 16 are kept.
    centred = kept - probability
    between_steps = (centred[1:] * centred[:-1]).mean(axis=0) / 0.25
    np.testing.assert_allclose(between_steps, 0, atol=0.08)
    pairs = centred.T @ centred / steps / 0.25
    np.testing.assert_allclose(pairs[~np.eye(patches, dtype=bool)], -1 / (patches - 1), atol=0.08)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_blocks_are_kept_with_the_keep_probability(probability):
    keep = np.asarray(draw_attn_keep(jax.random.key(2), 4000, 6, jnp.float32(probability)))
    assert keep.shape == (4000, 6)
    np.testing.assert_allclose(keep.mean(axis=0), probability, atol=0.035)
    if 0 < probability < 1:
        correlations = np.corrcoef(keep.T)[~np.eye(6, dtype=bool)]
        np.testing.assert_allclose(correlations, 0, atol=0.08)
        in_time = np.corrcoef(keep[1:].ravel(), keep[:-1].ravel())[0, 1]
        assert abs(in_time) < 0.03


def test_other_keys_draw_other_masks():
    draws = [draw_patch_keep(jax.random.key(k), 3, (8, 8), jnp.float32(0.5)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
