"""Schedules and optimizer against the reference's recorded rates and loops written by hand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_at import models, weights
from vit_at.configs import default
from vit_at.training.optim import (
    by_layer,
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    matrices,
)

with np.load(pathlib.Path(__file__).parents[1] / "data" / "steps" / "schedule.npz") as _archive:
    RECORDED = dict(_archive)
SETS = sorted({name.split("/")[0] for name in RECORDED})


def config_with(**options):
    """The default with other epochs and other fields of config.optimizer."""
    config = default.get_config()
    with config.unlocked():
        config.epochs = options.pop("epochs", config.epochs)
        config.optimizer.update(options)
    return config


def rates(config, steps_per_epoch):
    schedule = learning_rate(config, steps_per_epoch)
    steps = jnp.arange(config.epochs * steps_per_epoch)
    return np.array([schedule(step) for step in steps])


@pytest.mark.parametrize("name", SETS)
def test_the_rate_of_every_step_is_the_references(name):
    recorded = RECORDED[f"{name}/lr"]
    config = config_with(
        epochs=int(RECORDED[f"{name}/epochs"]), learning_rate=float(RECORDED[f"{name}/lr_max"])
    )
    ours = rates(config, int(RECORDED[f"{name}/steps_per_epoch"]))
    assert len(ours) == len(recorded)
    np.testing.assert_allclose(ours, recorded, rtol=1e-6)


def test_a_short_run_starts_at_the_full_rate_and_then_drops():
    """As the reference does where there are no more epochs than drop_before_end."""
    ours = rates(config_with(epochs=4), 2)
    np.testing.assert_allclose(ours, [0.1, 0.01, 0.01, 0.01, 1e-3, 1e-3, 1e-3, 1e-3], rtol=1e-6)


def test_fractional_drops_take_effect_at_the_next_step():
    ours = rates(config_with(epochs=2, drop_before_end=(0.75,), drop_factor=0.5), 3)
    np.testing.assert_allclose(ours, [0.1, 0.1, 0.1, 0.1, 0.05, 0.05], rtol=1e-6)


def test_warm_up_is_linear_and_the_drops_stay_where_they_are():
    ours = rates(config_with(epochs=10, warmup_epochs=2.0), 2)
    np.testing.assert_allclose(ours[:5], [0, 0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(ours[5:10], 0.1, rtol=1e-6)
    np.testing.assert_allclose(ours[10:16], 0.01, rtol=1e-6)
    np.testing.assert_allclose(ours[16:], 0.001, rtol=1e-6)


def test_cosine_falls_from_peak_to_zero():
    ours = rates(config_with(epochs=4, schedule="cosine", warmup_epochs=1.0), 4)
    expected = [0.1 * (1 + np.cos(np.pi * k / 12)) / 2 for k in range(12)]
    np.testing.assert_allclose(ours, [0, 0.025, 0.05, 0.075, *expected], rtol=1e-5)


def test_cyclic_rises_to_the_peak_and_falls_to_zero():
    ours = rates(config_with(epochs=4, schedule="cyclic", warmup_epochs=1.0), 2)
    expected = [0, 0.05, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.05, 0.1 * 2 / 6, 0.1 / 6]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "cyclic", "constant", "step"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_warm_up_that_rounds_to_the_whole_run_leaves_the_peak(schedule, steps):
    options = {"epochs": 1, "warmup_epochs": 0.9, "drop_before_end": ()}
    config = config_with(schedule=schedule, **options)
    expected = np.linspace(0, 0.1, steps) if steps > 1 else [0.1]
    np.testing.assert_allclose(rates(config, steps), expected, rtol=1e-6)
    after = float(learning_rate(config, steps)(steps))
    np.testing.assert_allclose(after, 0 if schedule in ("cosine", "cyclic") else 0.1, atol=1e-8)


def test_constant_is_constant():
    np.testing.assert_allclose(rates(config_with(epochs=2, schedule="constant"), 3), 0.1, rtol=1e-6)


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1 / (5 + 1e-6)), (0.1, 1.0)])
def test_clipping_divides_by_the_norm_plus_a_millionth(scale, factor):
    gradient = {"a": scale * jnp.array([3.0]), "b": scale * jnp.array([[0.0, 4.0]])}
    clip = clip_by_global_norm(1.0)
    clipped, _ = clip.update(gradient, clip.init(gradient))
    np.testing.assert_allclose(clipped["a"], factor * gradient["a"], rtol=1e-7)
    np.testing.assert_allclose(clipped["b"], factor * gradient["b"], rtol=1e-7)


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.7, -0.1])}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_weight_decay_reaches_every_parameter(name):
    chain = make_optimizer(config_with(name=name, weight_decay=0.5), 100)
    zeros = {n: jnp.zeros_like(p) for n, p in PARAMS.items()}
    updates, _ = chain.update(zeros, chain.init(PARAMS), PARAMS)
    for parameter, value in PARAMS.items():
        np.testing.assert_allclose(updates[parameter], -0.1 * 0.5 * value, rtol=1e-6)


def run(config, gradients):
    """Parameters after updates with these gradients, and the factors each was clipped by."""
    chain = make_optimizer(config, steps_per_epoch=1)
    params, state = PARAMS, chain.init(PARAMS)
    for gradient in gradients:
        updates, state = chain.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def gradients_of(count):
    rng = np.random.default_rng(0)
    return [{n: jnp.asarray(rng.normal(size=p.shape)) for n, p in PARAMS.items()}] * count


def clipped_by_hand(gradient, max_norm):
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    return {n: factor * np.asarray(g, np.float64) for n, g in gradient.items()}


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_sgd_is_torchs_loop(clip_norm):
    """clip_grad_norm_, then torch.optim.SGD: decay added, then the momentum buffer, no Nesterov."""
    options = {"learning_rate": 0.05, "momentum": 0.8, "weight_decay": 0.01, "epochs": 8}
    gradients = gradients_of(8)
    ours = run(config_with(clip_norm=clip_norm, **options), gradients)
    params = {n: np.asarray(p, np.float64) for n, p in PARAMS.items()}
    buffer = {n: np.zeros_like(p) for n, p in params.items()}
    for t, gradient in enumerate(gradients):
        rate = 0.05 * (0.01 if t >= 6 else 0.1 if t >= 3 else 1)
        for name, g in clipped_by_hand(gradient, clip_norm).items():
            buffer[name] = 0.8 * buffer[name] + g + 0.01 * params[name]
            params[name] = params[name] - rate * buffer[name]
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5)


def test_adamw_is_torchs_loop():
    """Decoupled decay: the decay does not go through the moments."""
    options = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant"}
    gradients = gradients_of(4)
    ours = run(config_with(b1=0.8, b2=0.9, **options), gradients)
    params = {n: np.asarray(p, np.float64) for n, p in PARAMS.items()}
    first = {n: np.zeros_like(p) for n, p in params.items()}
    second = {n: np.zeros_like(p) for n, p in params.items()}
    for t, gradient in enumerate(gradients, start=1):
        for name, g in clipped_by_hand(gradient, 1.0).items():
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            step = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-8)
            params[name] = params[name] - 0.01 * (step + 0.1 * params[name])
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5)


def test_muons_update_of_a_matrix_is_orthogonal_and_as_large_as_adams():
    """Each block by itself, a convolution as one matrix; the rest is Adam's."""
    rng = np.random.default_rng(0)
    shapes = {"fc1": (2, 12, 16), "stem": (3, 3, 2, 8), "head": (12, 3)}
    gradient = {n: {"kernel": jnp.asarray(rng.normal(size=s))} for n, s in shapes.items()}
    chain = make_optimizer(config_with(name="muon", weight_decay=0.0, learning_rate=1.0), 100)
    updates, _ = chain.update(gradient, chain.init(gradient), gradient)
    updates, gradient = (
        {n: np.asarray(tree[n]["kernel"]) for n in shapes} for tree in (updates, gradient)
    )
    pairs = [*zip(updates["fc1"], gradient["fc1"], strict=True)]
    pairs.append((updates["stem"].reshape(18, 8), gradient["stem"].reshape(18, 8)))
    for update, g in pairs:
        left, _, right = np.linalg.svd(g, full_matrices=False)
        in_its_axes = left.T @ -update @ right.T / (0.2 * max(g.shape) ** 0.5)
        sizes = np.diag(in_its_axes)
        np.testing.assert_allclose(sizes, 1, atol=0.35)  # after five iterations, 0.7 to 1.2
        np.testing.assert_allclose(in_its_axes, np.diag(sizes), atol=1e-4)
    first = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # Nesterov's, of Adam
    np.testing.assert_allclose(updates["head"], -first * np.sign(gradient["head"]), rtol=1e-3)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("vit_tiny_patch16_224", {"head"}),
        ("vit_tiny_patch16_224 conv", {"head"}),
        ("deit_tiny_distilled_patch16_224", {"head", "head_dist"}),
        ("convit_tiny", {"head", "pos_proj"}),
        ("swin_tiny_patch4_window7_224", {"head"}),
        ("xcit_tiny_12_p16_224", {"head", "conv1", "conv2"}),
        ("convnext_tiny", {"head_fc", "conv_dw"}),
    ],
)
def test_muon_leaves_heads_depthwise_convolutions_and_coordinates_to_adam(name, left, in_channels):
    """Of grey images, too: the first kernel has one input channel, but is not depthwise."""
    name, _, stem = name.partition(" ")
    options = {"stem": stem} if stem else {}
    model = models.create(name, num_classes=3, in_channels=in_channels, **options)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    axes = jax.tree.leaves_with_path(matrices(shapes), is_leaf=lambda x: not isinstance(x, dict))
    kernels = {path: found for path, found in axes if path[-1].key == "kernel"}
    assert {path[-2].key for path, found in kernels.items() if found is None} == left
    assert all(found is None for path, found in axes if path not in kernels)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "convit_tiny"])
def test_the_rate_falls_from_layer_to_layer_down_to_the_embeddings(name):
    """Against timm's names, by the rule of BEiT: embeddings 0, block i: i + 1, the rest last."""
    sizes = {"embed_dim": 8, "num_heads": 2, "depth": 12, "image_size": 8, "patch_size": 4}
    model = models.create(name, num_classes=3, **sizes)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    chain = by_layer(0.5, model.num_blocks)
    scaled, _ = chain.update(ones, chain.init(ones))
    for timm_name, value in weights.to_timm(scaled, model).items():
        block = re.match(r"blocks\.(\d+)\.", timm_name)
        embedding = timm_name.startswith(("patch_embed", "pos_embed", "cls_token", "dist_token"))
        layer = int(block[1]) + 1 if block else 0 if embedding else 13
        np.testing.assert_array_equal(value, 0.5 ** (13 - layer), err_msg=timm_name)


def test_a_decay_of_layers_multiplies_the_whole_update():
    params = {"head": PARAMS, "pos_embed": jnp.ones((1, 2, 2))}
    plain, decayed = (
        make_optimizer(config_with(layer_decay=decay), 100, depth=2) for decay in (1.0, 0.5)
    )
    (a, _), (b, _) = (c.update(params, c.init(params), params) for c in (plain, decayed))
    jax.tree.map(np.testing.assert_array_equal, a["head"], b["head"])
    np.testing.assert_allclose(b["pos_embed"], a["pos_embed"] / 8, rtol=1e-6)
