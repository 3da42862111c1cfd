"""The blocks: the gate that ARD needs, stochastic depth, one by one or scanned, fused attention."""

import functools
import types

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tpu_blocks
from jax.extend import core as jax_core

from vit_at import models, weights
from vit_at.configs import fields
from vit_at.models import blocks, layers, tpu_attention

# Small models of each family, with fewer blocks and a narrower trunk than any published one.
SMALL = {
    "deit_tiny_patch16_224": {"depth": 3, "embed_dim": 24},
    "deit_tiny_distilled_patch16_224": {"depth": 3, "embed_dim": 24},
    "convit_tiny": {"depth": 3, "embed_dim": 32},
    "swin_tiny_patch4_window7_224": {"depth": 8, "embed_dim": 12},
}


@functools.cache
def small(name, dtype="float32", **overrides):
    """A small model of a family at 32 pixels, with weights by the golden rule."""
    options = SMALL[name] | {"num_classes": 10, "image_size": 32, "patch_size": 4} | overrides
    model = models.create(name, dtype=dtype, **options)
    return model, golden.params(model)


def small_gradients(name):
    """Gradients of a small model for the images and the weights, with and without masked blocks."""
    model, params = small(name)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    step = jax.jit(jax.grad(functools.partial(golden.loss_and_logits, model), (0, 1), has_aux=True))
    some = jnp.arange(model.num_blocks) % 3 != 1
    return [jax.tree.map(np.asarray, step(images, params, k)) for k in (some, some | True)]


def plain_gate(norm, attention, x, keep):
    """keep * a + (1 - keep) * stop_gradient(a), the definition."""
    a = attention(norm(x))
    return keep * a + (1 - keep) * jax.lax.stop_gradient(a)


# Swin takes longest to compile; the distilled model is DeiT with one more token.
MOST = [runs.slow(name) if "swin" in name or "distilled" in name else name for name in SMALL]


@pytest.mark.parametrize("name", MOST)
def test_gate_is_its_definition(name, monkeypatch):
    gated, unmasked = small_gradients(name)
    model, params = small(name)
    plain = golden.forward(model, params, jnp.asarray(golden.images(32, "cifar"), jnp.float32))
    for _, logits in (gated, unmasked):
        np.testing.assert_allclose(logits, plain, atol=1e-5)

    monkeypatch.setattr(blocks, "attention_branch", plain_gate)
    expected, _ = small_gradients(name)
    for got, wanted, free in zip(gated[0], expected[0], unmasked[0], strict=True):
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
        jax.tree.map(
            lambda a, b, atol=1e-5 * scale: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
            got,
            wanted,
        )
        difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, free)
        assert max(jax.tree.leaves(difference)) > 1e-3 * scale


def _equations(jaxpr, of_branches):
    for equation in jaxpr.eqns:
        yield equation
        if of_branches or equation.primitive.name != "cond":
            for inner in jax_core.jaxprs_in_params(equation.params):
                yield from _equations(inner, of_branches)


def _products(jaxpr):
    return sum(e.primitive.name == "dot_general" for e in _equations(jaxpr, of_branches=True))


@pytest.mark.parametrize("name", MOST)
def test_masked_backward_pass_is_not_computed(name):
    model, params = small(name)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    gradient = jax.jit(jax.grad(functools.partial(golden.loss_and_logits, model), has_aux=True))
    keep = jnp.zeros(model.num_blocks, bool)
    jaxpr = jax.make_jaxpr(gradient)(images, params, keep).jaxpr
    conditionals = [e for e in _equations(jaxpr, of_branches=False) if e.primitive.name == "cond"]
    pairs = [equation.params["branches"] for equation in conditionals]
    # The others choose the way of one product by the platform.
    branches = [pair for pair in pairs if max(_products(branch.jaxpr) for branch in pair) > 1]
    assert branches, "no branch depends on the mask"
    for skipped, computed in branches:
        assert _products(skipped.jaxpr) == 0
        assert _products(computed.jaxpr) >= 6  # of qkv, the logits, the values and proj
    if name.startswith("deit"):  # what XLA makes of it is the same for all, and takes long
        compiled = gradient.lower(images, params, keep).compile().as_text()
        assert compiled.count(" conditional(") == len(branches)


@pytest.mark.parametrize("name", MOST)
def test_bfloat16_gives_float32_logits(name):
    model, params = small(name, dtype="bfloat16")
    exact, _ = small(name)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    logits, expected = golden.forward(model, params, images), golden.forward(exact, params, images)
    assert logits.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert 0 < golden.error(logits, expected) < 0.1


@pytest.mark.parametrize("name", MOST)
def test_stochastic_depth_drops_the_attention_branch_alone(name, monkeypatch):
    model, params = small(name, drop_path=0.5)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)

    @jax.jit
    def train(params, key):
        return model.apply({"params": params}, images, train=True, rngs={"drop_path": key})

    if name.startswith("deit"):
        first, second = (train(params, jax.random.key(i)) for i in range(2))
        assert golden.error(first, second) > 1e-3
        np.testing.assert_array_equal(first, train(params, jax.random.key(0)))
        train.clear_cache()

    monkeypatch.setattr(blocks, "drop_path", lambda key, x, rate: jnp.zeros_like(x))
    dropped = train(params, jax.random.key(0))
    without = weights.to_timm(params, model)
    without |= {n: 0 * v for n, v in without.items() if ".attn.proj." in n}
    expected = golden.forward(model, weights.from_timm(without, model), images)
    np.testing.assert_allclose(dropped, expected, atol=1e-5)


@pytest.mark.parametrize("name", MOST)
def test_a_key_for_each_image_makes_its_depth_independent_of_the_others(name):
    model, params = small(name, drop_path=0.5)
    apply = jax.jit(models.classifier(model, (0.5,) * 3, (0.5,) * 3), static_argnames="train")
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(images))

    def logits(rows):
        return apply(params, images[rows], train=True, rngs={"drop_path": keys[rows]})

    whole, backwards = logits(slice(None)), logits(slice(None, None, -1))
    np.testing.assert_allclose(whole, backwards[::-1], rtol=1e-4, atol=1e-5)
    same, keys = jnp.repeat(images[:1], 16, 0), jax.random.split(jax.random.key(0), 16)
    of_same = apply(params, same, train=True, rngs={"drop_path": keys})
    assert len(np.unique(np.round(of_same, 4), axis=0)) > 1


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("deit_tiny_patch16_224", False),
        runs.slow("deit_tiny_patch16_224", True),
        *(runs.slow(name, remat) for name in [*SMALL][1:] for remat in (False, True)),
    ],
)
def test_blocks_one_by_one_are_those_of_the_scan(name, remat):
    """Logits and all gradients, with masked blocks and stochastic depth."""
    model, params = small(name, drop_path=0.5, remat=remat)
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    keep = jnp.arange(model.num_blocks) != 1
    # Of this key, some of the images keep their last attention.
    rngs = {"drop_path": jax.random.split(jax.random.key(1), len(images))}

    def loss(params, images):
        return (apply(params, images, keep, train=True, rngs=rngs) ** 2).sum()

    laid_out = models.unstack_blocks(apply, params)
    kinds = {type(tree) for tree in laid_out.values()}
    assert kinds == {blocks.Unstacked, *(type(tree) for tree in params.values())}
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected, (expected_to_params, expected_to_images) = step(params, images)
    value, (to_params, to_images) = step(laid_out, images)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert golden.error(to_images, expected_to_images) < 1e-4
    to_params = weights.to_timm(models.stack_blocks(to_params), model)
    for key, gradient in weights.to_timm(expected_to_params, model).items():
        np.testing.assert_allclose(to_params[key], gradient, rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"])
def test_fused_attention_is_attention(name, monkeypatch):
    """An odd number of tokens and an even one, by JAX's formula in place of cuDNN's kernel."""
    original = jax.nn.dot_product_attention
    calls = []

    def on_a_cpu(*arguments, implementation, **options):
        calls.append((implementation, options["query_seq_lengths"] is None))
        return original(*arguments, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    model, params = small(name, dtype="bfloat16", image_size=28)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)[:, :28, :28]
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    fused = models.for_device(apply, types.SimpleNamespace(compute_capability="9.0"))
    assert fused.model.attention_kernel == "cudnn"

    def loss(params, images, apply):
        logits = apply(params, images, jnp.arange(model.num_blocks) != 1)
        return (logits**2).sum(), logits

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (expected_to_params, expected), expected_logits = step(params, images, apply)
    (to_params, to_images), logits = step(params, images, fused)
    assert set(calls) == {("cudnn", "distilled" not in name)}
    assert golden.error(logits, expected_logits) < 0.02
    assert golden.error(to_images, expected) < 0.05
    for a, b in zip(*map(jax.tree.leaves, (to_params, expected_to_params)), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 4])
def test_attention_by_the_kernel_of_a_tpu_is_attention(count, monkeypatch):
    """Logits and gradients of a small model; the kernel takes eight images, not four."""
    ran = tpu_blocks.stand_in(monkeypatch, tpu_attention)
    model, params = small("deit_tiny_patch16_224", dtype="bfloat16", image_size=16)
    images = jax.random.uniform(jax.random.key(0), (count, 16, 16, 3))
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    by_kernel = models.for_device(apply, types.SimpleNamespace(platform="tpu"))

    def loss(params, images, apply):
        logits = apply(params, images, jnp.arange(model.num_blocks) != 1)
        return (logits**2).sum(), logits

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (expected_to_params, expected), expected_logits = step(params, images, apply)
    assert not ran
    (to_params, to_images), logits = step(params, images, by_kernel)
    assert set(ran) == ({"attention_forward", "attention_backward"} if count == 8 else set())
    assert golden.error(logits, expected_logits) < 0.02
    assert golden.error(to_images, expected) < 0.05
    for a, b in zip(*map(jax.tree.leaves, (to_params, expected_to_params)), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b) + 1e-3


def test_attention_is_one_kernel_in_bfloat16_on_devices_that_can():
    def kernel(capability="", platform="gpu", **options):
        model, _ = small("deit_tiny_patch16_224", **options)
        apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
        device = types.SimpleNamespace(compute_capability=capability, platform=platform)
        return models.for_device(apply, device).model.attention_kernel

    assert kernel("8.0", dtype="bfloat16") == "cudnn"
    assert kernel("", "tpu", dtype="bfloat16") == "pallas"
    assert kernel("8.0") == kernel("", "tpu") == kernel("", "cpu", dtype="bfloat16") == ""
    for other in ("7.5", "gfx90a", ""):  # a T4, an AMD, a device without the attribute
        assert kernel(other, dtype="bfloat16") == ""
    assert kernel("8.0", dtype="bfloat16", embed_dim=36) == ""  # heads of 12


@pytest.mark.parametrize("name", MOST)
def test_weights_cast_before_an_attack_change_no_bit(name):
    model, params = small(name, dtype="bfloat16")
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    cast = models.cast_kernels(apply, models.unstack_blocks(apply, params))
    assert {x.dtype.name for x in jax.tree.leaves(cast)} == {"float32", "bfloat16"}
    cast = models.stack_blocks(cast)
    np.testing.assert_array_equal(
        golden.forward(model, cast, images), golden.forward(model, params, images)
    )


def test_drop_path_keeps_the_mean():
    x = jnp.ones((20_000, 1, 1))
    dropped = layers.drop_path(jax.random.key(0), x, jnp.asarray(0.1))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.9)}
    assert abs(float(dropped.mean()) - 1) < 0.01


def test_a_drop_path_of_a_billionth_is_none():
    """configs/default.py offers it, because 0 is the architecture's own."""
    x = jnp.linspace(-1, 1, 20_000).reshape(-1, 1)
    dropped = layers.drop_path(jax.random.key(0), x, jnp.asarray(1e-9))
    np.testing.assert_array_equal(dropped, x)
    assert "1e-9: none" in fields.meanings()["model.drop_path"]
