"""What a training step draws, and the attack that starts from it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from vit_at.attacks import Threat
from vit_at.training import step
from vit_at.training.attack import Start, draw, perturb, reach
from vit_at.training.masking import Masking

SHAPE = (6, 8, 8, 3)


def draws(key=0, objective="at", **options):
    arguments = {
        "objective": objective,
        "threat": Threat("linf", 0.1, 0.025, 5),
        "masking": Masking(ard=True, prm=True, warmup_epochs=10.0, patch_size=4),
        "progress": 5.0,
        "image_shape": SHAPE,
        "num_blocks": 3,
    }
    return draw(jax.random.key(key), **arguments | options)


def test_draws_have_the_documented_shapes_and_types():
    drawn = draws()
    assert drawn.delta.shape == SHAPE
    assert drawn.delta.dtype == jnp.float32
    assert drawn.attn_keep.shape == (5, 3)
    assert drawn.patch_keep.shape == (5, 2, 2)
    assert drawn.attn_keep.dtype == drawn.patch_keep.dtype == bool
    np.testing.assert_array_equal(drawn.patch_keep.sum(axis=(1, 2)), 2)


def test_the_same_key_draws_the_same_and_another_key_something_else():
    jax.tree.map(np.testing.assert_array_equal, draws(7), draws(7))
    for a, b in zip(draws(7), draws(8), strict=True):
        assert (np.asarray(a) != np.asarray(b)).any()


def test_named_augmentations_are_part_of_the_step():
    config, programs = runs.smoke(), set()
    batch = {"image": np.zeros((4, 16, 16, 1), np.uint8), "label": np.zeros(4, np.int32)}
    for names in ("", "random-erasing", "color-jitter"):
        config.data.augment = names
        static = types.SimpleNamespace(config=config, num_classes=10)
        inputs = functools.partial(step._inputs, static, jax.random.key(0))
        programs.add(str(jax.make_jaxpr(inputs)(batch)))
    assert len(programs) == 3


@pytest.mark.parametrize("ard", [False, True])
@pytest.mark.parametrize("prm", [False, True])
def test_a_masking_that_is_off_is_none_and_changes_no_other_draw(ard, prm):
    drawn = draws(masking=Masking(ard=ard, prm=prm, patch_size=4))
    assert (drawn.attn_keep is not None) == ard
    assert (drawn.patch_keep is not None) == prm
    np.testing.assert_array_equal(drawn.delta, draws().delta)


def test_at_starts_uniformly_in_the_ball():
    delta = np.asarray(draws(image_shape=(64, 16, 16, 1)).delta)
    assert np.abs(delta).max() <= 0.1
    assert np.std(delta) == pytest.approx(0.1 / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize("objective", ["trades", "mart"])
def test_trades_and_mart_start_at_a_thousandth_of_a_normal_in_normalised_units(objective):
    std = (0.2, 0.4, 0.8)
    options = {"image_shape": (64, 16, 16, 3), "start": Start(std=std)}
    delta = np.asarray(draws(objective=objective, **options).delta)
    np.testing.assert_allclose(delta.std(axis=(0, 1, 2)), 0.001 * np.array(std), rtol=0.03)
    np.testing.assert_allclose(delta.mean(axis=(0, 1, 2)), 0, atol=3e-5)


@pytest.mark.parametrize("objective", ["at", "mart"])
def test_a_zero_start_is_zero(objective):
    np.testing.assert_array_equal(draws(objective=objective, start=Start("zero")).delta, 0)


def test_n_fgsm_adds_its_step_to_twice_the_ball_of_noise_and_clips_to_the_image_range():
    """Algorithm 1 of de Jorge et al. 2022, written out."""
    threat = Threat("linf", 0.1, 0.1, 1)
    drawn = draws(threat=threat, masking=Masking(), start=Start("noise"))
    assert 0.1 < float(jnp.abs(drawn.delta).max()) <= 0.2
    images, slope = jax.random.uniform(jax.random.key(3), (2, *SHAPE))
    targets = jax.nn.one_hot(jnp.zeros(len(images), int), 2)

    def apply(params, images, attn_keep=None):
        return (params * images).sum((1, 2, 3))[:, None] * jnp.array([1.0, -1.0])

    slope = slope - 0.5
    options = {"objective": "at", "threat": reach(threat, "noise")}
    adversarial = perturb(apply, slope, images, targets, drawn, **options)
    noise = jnp.clip(images + drawn.delta, 0, 1) - images
    expected = jnp.clip(images + noise - 0.1 * jnp.sign(slope), 0, 1)
    np.testing.assert_allclose(adversarial, expected, atol=1e-6)
    assert float(jnp.abs(adversarial - images).max()) > 0.2
    assert reach(threat, "random") is threat


def test_auto_pgd_in_training_keeps_the_worst_point_and_heeds_ard():
    images, slope = jax.random.uniform(jax.random.key(3), (2, *SHAPE))
    targets, threat = jax.nn.one_hot(jnp.zeros(len(images), int), 2), Threat("linf", 0.1, 0.1, 3)

    def apply(params, images, attn_keep=None):
        fixed = jax.lax.stop_gradient(images)
        gated = images if attn_keep is None else jnp.where(attn_keep[0], images, fixed)
        score = (jnp.sin(9 * params * images) - 2 * jnp.sin(5 * gated)).mean((1, 2, 3))
        return score[:, None] * jnp.array([1.0, -1.0])

    drawn = draws(threat=threat, masking=Masking(ard=True, keep_max=0.5), num_blocks=1)
    drawn = drawn._replace(attn_keep=jnp.array([[True], [False], [True]]))
    options = {"objective": "at", "threat": threat, "method": "apgd"}
    found = perturb(apply, slope, images, targets, drawn, **options)
    blind = perturb(apply, slope, images, targets, drawn._replace(attn_keep=None), **options)

    def loss(points):
        return np.asarray(optax.softmax_cross_entropy(apply(slope, points), targets))

    start = jnp.clip(images + drawn.delta, 0, 1)
    assert (loss(found) >= loss(start)).all()
    assert (loss(found) > loss(start)).any()
    assert float(jnp.abs(found - images).max()) <= 0.1 + 1e-6
    assert float(jnp.abs(found - blind).max()) > 0.01


def test_natural_training_has_no_attack():
    images = jnp.full(SHAPE, 0.5)
    same = perturb(None, None, images, None, draws(), objective="natural", threat=Threat())
    assert same is images
