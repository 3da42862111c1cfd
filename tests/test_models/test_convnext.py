"""ConvNeXt against timm 1.0.31 in float64, with tiny widths and weights by the golden rule."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vit_at import configs, models, weights
from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.models import convnext, convolution
from vit_at.reporting.exported import timm_arguments
from vit_at.training.setup import initial_state

WIDTHS = {"patch": 8, "conv": 12}  # of the golden file of each stem


@functools.cache
def create(stem, dtype="float32", **overrides):
    options = {"depth": 10, "embed_dim": WIDTHS[stem], "image_size": 32} | overrides
    model = models.create("convnext_tiny", num_classes=10, stem=stem, dtype=dtype, **options)
    return model, golden.params(model), jnp.asarray(golden.images(32, "cifar"))


def loss_and_logits(model, images, params):
    logits = model.apply({"params": params}, images, jnp.zeros(0, bool))
    log_p = jax.nn.log_softmax(logits)
    return -log_p[jnp.arange(2), golden.LABELS].mean(), logits


@pytest.mark.parametrize(("stem", "dtype"), [runs.slow("patch", "float64"), ("conv", "float32")])
def test_reference(stem, dtype):
    """Scanned in float64; in float32, block by block, with blocks computed again."""
    expected, wide = golden.arrays(f"convnext_{stem}"), dtype == "float64"
    with jax.enable_x64(wide):
        model, params, images = create(stem, dtype, remat=not wide)
        assert model.num_blocks == 0
        if not wide:
            apply = models.classifier(model, (0.0,) * 3, (1.0,) * 3)
            params = models.unstack_blocks(apply, params)
        step = jax.jit(jax.grad(functools.partial(loss_and_logits, model), has_aux=True))
        g, logits = step(images.astype(dtype), params)
    assert golden.error(logits, expected["logits"]) < (1e-6 if wide else 1e-5)
    assert golden.error(g, expected["g"]) < (1e-6 if wide else 5e-5)


def test_stem_of_the_larger_models():
    """Three convolutions, the last of stride 1: Singh et al.'s stem of ConvNeXt-B and -L."""
    model = convnext.ConvStem(128, 1e-6, "float32")
    images = golden.images(32, "cifar").astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}

    def draw(module, leaf, shape):
        name = f"stem.{module.replace('_', '.')}.{names[leaf]}"
        if leaf == "kernel":
            shape = [shape[i] for i in (3, 2, 0, 1)]
            return golden.weight(name, tuple(shape)).transpose(2, 3, 1, 0)
        return golden.weight(name, shape)

    params = {
        m: {n: draw(m, n, x.shape) for n, x in leaves.items()} for m, leaves in shapes.items()
    }
    features = model.apply({"params": params}, images)[:, ::2, ::2]
    assert golden.error(features, golden.arrays("convnext_conv_base_stem")["features"]) < 1e-5


@pytest.mark.parametrize("stem", WIDTHS)
def test_weights_go_both_ways(stem):
    model, params, _ = create(stem)
    state = weights.to_timm(params, model)
    stem_names = {"patch": {"stem.0", "stem.1"}, "conv": {f"stem.stem.{i}" for i in (0, 1, 3, 4)}}
    found = {name.rpartition(".")[0] for name in state if name.startswith("stem.")}
    assert found == stem_names[stem]
    again = weights.from_timm(state, model)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))


def test_weights_load_into_timm():
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model, params, images = create("patch")
    theirs = timm.create_model(**timm_arguments(model, "convnext_tiny")).eval()
    state = weights.to_timm(params, model)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    with torch.no_grad():
        batch = torch.tensor(np.asarray(images, np.float32).transpose(0, 3, 1, 2))
        logits = theirs(batch).numpy()
    np.testing.assert_allclose(logits, golden.arrays("convnext_patch")["logits"], atol=1e-4)


def test_what_timm_has_not_is_not_exported():
    model, _, _ = create("conv")
    with pytest.raises(UserError, match=r"timm has no mine with model\.stem 'conv'"):
        timm_arguments(model, "mine")


def test_a_new_head_and_smaller_patches():
    model, params, _ = create("patch")
    other = models.create(
        "convnext_tiny", num_classes=3, image_size=32, patch_size=2, embed_dim=8, depth=10
    )
    loaded, report = weights.convert(weights.to_timm(params, model), other)
    assert report.initialised == ["head.fc.weight", "head.fc.bias"]
    assert list(report.adapted) == ["stem.0.weight"]
    assert loaded["head_fc"]["kernel"].shape == (64, 3)
    assert np.isfinite(loaded["head_fc"]["kernel"]).all()
    cells = params["stem"]["0"]["kernel"].reshape(2, 2, 2, 2, 3, 8).sum((1, 3))
    np.testing.assert_allclose(loaded["stem"]["0"]["kernel"], cells, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_and_stochastic_depth():
    model, params, images = create("patch", "bfloat16", drop_path=0.9)
    apply = models.classifier(model, (0.0,) * 3, (1.0,) * 3)
    images = jnp.repeat(images[:1].astype(jnp.float32), 8, 0)
    keys = jax.random.split(jax.random.key(0), 8)
    train = jax.jit(lambda keys: apply(params, images, train=True, rngs={"drop_path": keys}))
    logits = train(keys)
    np.testing.assert_array_equal(logits, train(keys[::-1])[::-1])
    assert len(np.unique(logits, axis=0)) > 1
    plain = jax.jit(apply)(params, images)
    assert plain.dtype == jnp.float32
    assert golden.error(plain[0], golden.arrays("convnext_patch")["logits"][0]) < 0.1


@pytest.mark.parametrize(
    ("name", "gflop"),  # torch.utils.flop_counter on timm's model
    [("convnext_tiny", 8.911062528), ("convnext_base", 30.709458944)],
)
def test_forward_flops(name, gflop):
    model = models.create(name, num_classes=1000)
    assert model.forward_flops() == pytest.approx(gflop * 1e9)
    conv = models.create(name, num_classes=1000, stem="conv")
    d = model.embed_dim
    last = [(d // 2, d)] if d < 128 else [(d // 2, d // 4 * 3), (d // 4 * 3, d)]
    added = 112**2 * 27 * d // 2 + 56**2 * (9 * sum(a * b for a, b in last)) - 224**2 * 3 * d
    assert conv.forward_flops() - model.forward_flops() == pytest.approx(2 * added)


def test_gradients_of_the_depthwise_convolution():
    """Against automatic differentiation of its definition, in float64."""
    keys, size = jax.random.split(jax.random.key(0), 3), 5

    def definition(x, kernel):
        (_, h, w, _), margin = x.shape, size // 2
        padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        places = [(i, j) for i in range(size) for j in range(size)]
        return sum(padded[:, i : i + h, j : j + w] * kernel[i, j, 0] for i, j in places)

    with jax.enable_x64(True):
        x = jax.random.normal(keys[0], (2, 5, 4, 3), "float64")
        kernel = jax.random.normal(keys[1], (size, size, 1, 3), "float64")
        weight = jax.random.normal(keys[2], x.shape, "float64")

        @functools.partial(jax.jit, static_argnums=0)
        def results(function, x, kernel):
            value, vjp = jax.vjp(function, x, kernel)
            return value, *vjp(weight)

        found, expected = (results(f, x, kernel) for f in (convolution.depthwise, definition))
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (2, 2, 0), (1, 1, 0)]
)
def test_gradients_of_a_convolution(size, stride, padding):
    """Against automatic differentiation of XLA's, in float64; sides that the stride leaves over."""
    keys = jax.random.split(jax.random.key(0), 3)
    strides, margins = (stride, stride), ((padding, padding),) * 2

    def definition(x, kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, margins, dimension_numbers=axes)

    with jax.enable_x64(True):
        x = jax.random.normal(keys[0], (2, 7, 6, 3), "float64")
        kernel = jax.random.normal(keys[1], (size, size, 3, 5), "float64")
        weight = jax.random.normal(keys[2], definition(x, kernel).shape, "float64")

        @functools.partial(jax.jit, static_argnums=0)
        def results(function, x, kernel):
            value, vjp = jax.vjp(function, x, kernel)
            return value, *vjp(weight)

        convolve = functools.partial(convolution.convolve, strides=strides, padding=margins)
        found = results(convolve, x, kernel)
        for got, wanted in zip(found, results(definition, x, kernel), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.slow
def test_training_masks_the_perturbation_by_pixels():
    """PRM's squares have masking.patch_size pixels, and every weight learns."""
    options = {"masking__prm": True, "masking__patch_size": 4, "masking__warmup_epochs": 3.0}
    setup = runs.tiny_setup(2, epochs=3, **options)
    sizes = {"image_size": 8, "patch_size": 1, "in_channels": 1, "embed_dim": 4, "depth": 10}
    setup = setup._replace(model=models.create("convnext_tiny", num_classes=3, **sizes))
    state = initial_state(setup, runs.optimizer_of(setup))
    before = jax.device_get(state.params)
    (batch,) = (sharding.split_batch(b, setup.mesh) for b in runs.batches(setup, 1))
    state, metrics = runs.compiled_step(setup, state, batch)(state, batch)
    values = metrics.compute()
    assert np.isfinite(values["loss"])
    assert values["keep_probability"] == pytest.approx(1 / 12)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved))


def test_ard_has_nothing_to_mask():
    config = configs.load("digits_sgd:smoke")
    config.model.name, config.model.depth, config.model.num_heads = "convnext_tiny", 10, 0
    config.model.patch_size = 2
    models.build(config, 10, "float32")
    config.masking.ard = True
    with pytest.raises(UserError, match="convnext_tiny has no attention"):
        models.build(config, 10, "float32")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 9}, "depth 9 is too small"),
        ({"image_size": 240}, "image_size 240 .* a multiple of 32, such as 224 or 256"),
        ({"num_heads": 3}, "num_heads is 3, but ConvNeXt has no attention"),
        ({"qk_scale": 0.1}, "qk_scale is 0.1, but ConvNeXt has no attention"),
        ({"stem": "conv", "patch_size": 2}, "patches of 4 pixels"),
    ],
)
def test_what_does_not_suit_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        models.create("convnext_tiny", num_classes=10, **options)
