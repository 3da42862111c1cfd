"""Adversarial weight perturbation, against the authors' rule written out per layer in NumPy."""

import functools

import jax
import numpy as np
import pytest
import runs

from vit_at import models, weights
from vit_at.data import augment
from vit_at.distributed import sharding
from vit_at.training.awp import perturb_weights
from vit_at.training.objectives import training_loss
from vit_at.training.setup import initial_state

GAMMA = 0.02
AWP = {"awp__gamma": GAMMA, "threat__norm": "l2", "threat__eps": 0.5, "threat__step_size": 0.25}


@functools.cache
def model():
    sizes = {"embed_dim": 8, "num_heads": 2, "depth": 3, "image_size": 8, "patch_size": 4}
    return models.create("convit_tiny", num_classes=3, **sizes)


def test_weights_move_by_gamma_of_their_norm_layer_by_layer():
    """timm's arrays whose name ends in 'weight' and that have two axes or more, as the authors'."""
    apply = models.classifier(model(), (0.5,) * 3, (0.5,) * 3)
    shapes = jax.eval_shape(lambda: models.init_params(model(), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params, gradient = (
        jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes) for _ in range(2)
    )
    moved = weights.to_timm(perturb_weights(apply, params, gradient, GAMMA), model())
    before, slopes = (weights.to_timm(tree, model()) for tree in (params, gradient))
    perturbed = 0
    for name, weight in before.items():
        expected = weight
        if name.endswith("weight") and weight.ndim > 1:
            slope = slopes[name]
            expected = weight + GAMMA * np.linalg.norm(weight) * slope / np.linalg.norm(slope)
            perturbed += 1
        np.testing.assert_allclose(moved[name], expected, rtol=2e-6, atol=1e-7, err_msg=name)
    # Patches and head; of each block two layers of the MLP, the output projection, and qkv, or qk,
    # v and the projection of positions.
    assert perturbed == 2 + 2 * 6 + 1 * 4


@functools.cache
def stepped(devices=1, **changes):
    """(parameters before, after, metrics) of one step with AWP."""
    setup = runs.tiny_setup(devices, **AWP | changes)
    state = initial_state(setup, runs.optimizer_of(setup))
    batch = sharding.split_batch(next(runs.batches(setup, 1)), setup.mesh)
    before = jax.device_get(state.params)
    state, metrics = runs.compiled_step(setup, state, batch)(state, batch)
    return before, jax.device_get(state.params), metrics.compute()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_the_update_is_the_gradient_at_the_perturbed_weights(objective):
    """With an attack too small to matter, the whole step is a few lines of JAX."""
    plain = {"data__crop_padding": 0, "data__flip": False, "mixing__probability": 0.0}
    tiny = {"threat__eps": 1e-6, "threat__step_size": 1e-6}
    decay = {"optimizer__weight_decay": 0.01, "optimizer__clip_norm": 0.0}
    before, after, metrics = stepped(objective=objective, **plain, **tiny, **decay)

    setup = runs.tiny_setup()
    apply = models.classifier(setup.model, setup.config.data.mean, setup.config.data.std)
    batch = next(runs.batches(setup, 1))
    images, targets = augment.to_float(batch["image"]), jax.nn.one_hot(batch["label"], 3)

    def loss(params):
        return training_loss(objective, apply, params, images, images, targets)[0]

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.value_and_grad(loss))
        first, slope = gradient(before)
        moved = jax.jit(lambda params, slope: perturb_weights(apply, params, slope, GAMMA))
        value, slope = gradient(moved(before, slope))
    rate = setup.config.optimizer.learning_rate
    expected = jax.tree.map(lambda w, g: w - rate * (g + 0.01 * w), before, slope)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, after, expected)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-4)
    assert float(value) > float(first) * 1.001


@pytest.mark.slow
def test_the_step_does_not_depend_on_devices_parts_or_layout():
    options = {"mixing__probability": 0.0, "objective": "at"}
    _, one, _ = stepped(1, **options)
    _, several, _ = stepped(4, accumulate_steps=2, sharding="fsdp", **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, several)


@pytest.mark.slow
def test_before_its_warm_up_the_weights_stay():
    late = stepped(awp__warmup_epochs=1.0)
    none = stepped(awp__gamma=0.0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, late[1], none[1])
