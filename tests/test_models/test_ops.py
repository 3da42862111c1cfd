"""The written-out gradients against automatic differentiation of the textbook formulas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at.distributed import sharding
from vit_at.models import ops

KEYS = jax.random.split(jax.random.key(0), 3)


def textbook_layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


CASES = {
    "gelu": (ops.gelu, lambda x: x * jax.scipy.stats.norm.cdf(x), 1),
    "layer_norm": (
        lambda x, scale, bias: ops.layer_norm(x, scale, bias, 1e-5),
        textbook_layer_norm,
        3,
    ),
    "softmax": (
        lambda x: ops.softmax(x, x.dtype),
        lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
        1,
    ),
}


def arguments(count, dtype):
    shapes = ((2, 5, 7), (7,), (7,))[:count]
    return [
        3 * jax.random.normal(key, shape, dtype) for key, shape in zip(KEYS, shapes, strict=False)
    ]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_formulas_in_float64(name):
    ours, textbook, count = CASES[name]
    with jax.enable_x64(True):
        given = arguments(count, "float64")
        expected, expected_vjp = jax.vjp(textbook, *given)
        value, vjp = jax.vjp(ours, *given)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(ours(*given), expected, rtol=1e-12, atol=1e-13)
        cotangent = jnp.cos(jnp.arange(value.size)).reshape(value.shape)
        for a, b in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_rounded_once(name):
    """What comes out is the float32 result, rounded: no intermediate value was."""
    ours, _, count = CASES[name]
    x, *rest = arguments(count, "float32")
    x = x.astype("bfloat16")
    value, vjp = jax.vjp(lambda x: ours(x, *rest), x)
    exact, exact_vjp = jax.vjp(lambda x: ours(x, *rest), x.astype("float32"))
    assert value.dtype == jnp.bfloat16
    np.testing.assert_allclose(value.astype("float32"), exact, rtol=2**-7, atol=1e-6)
    cotangent = jnp.cos(jnp.arange(value.size)).reshape(value.shape).astype("bfloat16")
    (gradient,), (exact_gradient,) = vjp(cotangent), exact_vjp(cotangent.astype("float32"))
    assert gradient.dtype == jnp.bfloat16
    scale = np.abs(exact_gradient).max()
    np.testing.assert_allclose(gradient.astype("float32"), exact_gradient, atol=0.02 * scale)


def test_a_bfloat16_linear_layer_adds_up_in_float32_and_is_rounded_once():
    x, kernel, cotangent = (
        jax.random.normal(key, shape, "bfloat16")
        for key, shape in zip(KEYS, ((2, 300, 64), (64, 5), (2, 300, 5)), strict=True)
    )
    value, vjp = jax.vjp(ops.linear, x, kernel)
    wide = (x.astype("float32"), kernel.astype("float32"))
    expected, expected_vjp = jax.vjp(jnp.matmul, *wide)
    found = (value, *vjp(cotangent))
    for a, b in zip(found, (expected, *expected_vjp(cotangent.astype("float32"))), strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype("float32"), b, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("platform", "product"), [("cpu", "f32"), ("cuda", "bf16")])
def test_bfloat16_products_suit_the_platform_that_a_program_is_lowered_for(platform, product):
    """One product forward, one for each argument that is differentiated; for any platform here."""
    x, kernel = jnp.ones((2, 3, 4), "bfloat16"), jnp.ones((4, 5), "bfloat16")

    def products(argnums):
        gradient = jax.jit(jax.value_and_grad(lambda *a: ops.linear(*a).sum(), argnums))
        text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"dot_general.*-> tensor<(?:\d+x)+(\w+)>", text)

    assert products((0, 1)) == 3 * [product]
    assert products(0) == products(1) == 2 * [product]


@pytest.mark.parametrize("remat", [False, True])
def test_a_bfloat16_linear_layer_can_be_mapped_scanned_and_computed_again(remat):
    x, kernels = jnp.ones((4, 3, 8), "bfloat16"), jnp.full((2, 8, 8), 0.25, "bfloat16")
    layer = jax.checkpoint(ops.linear) if remat else ops.linear

    def scanned(x, kernels):
        return jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)[0].sum()

    split = jax.sharding.PartitionSpec("data")
    mesh = sharding.make_mesh(jax.devices()[:4])
    mapped = sharding.map_shards(jax.vmap(jax.grad(scanned), (0, None)), mesh, (split, None))
    expected = jnp.full_like(x, 4)  # each layer doubles the cotangent
    np.testing.assert_array_equal(jax.jit(mapped)(x, kernels), expected)
    np.testing.assert_array_equal(jax.grad(scanned, 1)(x, kernels)[1], 24)


def test_attention_weights_are_the_softmax_of_scaled_products():
    def textbook(q, k):
        return jax.nn.softmax(0.3 * jnp.einsum("bhqc,bhkc->bhqk", q, k))

    with jax.enable_x64(True):
        q, k = (
            jax.random.normal(key, (2, 3, n, 6), "float64")
            for key, n in zip(KEYS, (4, 5), strict=False)
        )
        expected, expected_vjp = jax.vjp(textbook, q, k)
        value, vjp = jax.vjp(lambda q, k: ops.attention_weights(q, k, 0.3), q, k)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        cotangent = jnp.cos(jnp.arange(value.size)).reshape(value.shape)
        for found, wanted in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_pooled_tokens_are_the_sum_by_the_attention_weights(platform, monkeypatch):
    taken = pretend(platform, monkeypatch)

    def textbook(q, x):
        weights = jax.nn.softmax(0.3 * jnp.einsum("bqd,bnd->bqn", q, x))
        return jnp.einsum("bqn,bnd->bqd", weights, x), jax.lax.stop_gradient(weights)

    with jax.enable_x64(True):
        q, x = (
            jax.random.normal(key, (2, n, 6), "float64")
            for key, n in zip(KEYS, (4, 5), strict=False)
        )
        expected, expected_vjp = jax.vjp(textbook, q, x)
        value, vjp = jax.vjp(lambda q, x: ops.pool(q, x, 0.3), q, x)
        for found, wanted in zip(value, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12)
        cotangents = tuple(jnp.cos(jnp.arange(y.size)).reshape(y.shape) for y in value)
        for found, wanted in zip(vjp(cotangents), expected_vjp(cotangents), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)
    assert all(taken) == (platform == "cuda")


def test_attention_weights_in_bfloat16_keep_nothing_wider():
    q = jax.random.normal(KEYS[0], (2, 5, 8), "bfloat16")
    value, vjp = jax.vjp(lambda q: ops.attention_weights(q, q, 0.5), q)
    assert value.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(vjp)} == {jnp.dtype("bfloat16")}


def test_large_logits_and_a_far_tail_stay_finite():
    logits = jnp.array([1e4, 1e4, -1e4])
    np.testing.assert_allclose(ops.softmax(logits, "float32"), [0.5, 0.5, 0])
    x = jnp.array([-1e4, -20.0, 0.0, 20.0, 1e4])
    np.testing.assert_allclose(ops.gelu(x), [0, 0, 0, 20, 1e4])
    np.testing.assert_allclose(jax.vmap(jax.grad(ops.gelu))(x), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_layer_norm_of_each_platform_is_the_same(platform, monkeypatch):
    """In bfloat16, what a GPU recomputes and a TPU sums up differ from a CPU's by rounding."""
    x, scale, bias = arguments(3, "float32")
    x = (x + 20).astype("bfloat16")  # a mean of several deviations, where squares could cancel

    def with_gradients():
        value, vjp = jax.vjp(lambda *of: ops.layer_norm(*of, 1e-5), x, scale, bias)
        return value, *vjp(jnp.cos(jnp.arange(value.size)).reshape(value.shape).astype(x.dtype))

    expected = with_gradients()
    taken = pretend(platform, monkeypatch)
    for a, b in zip(with_gradients(), expected, strict=True):
        a, b = a.astype("float32"), b.astype("float32")
        np.testing.assert_allclose(a, b, atol=0.01 * np.abs(b).max())
    assert any(taken), f"no branch for {platform}"


def pretend(platform, monkeypatch):
    """Takes the branches for a platform; the list gets, for each choice, whether there was one."""
    taken = []

    def as_there(*arguments, default, **branches):
        taken.append(platform in branches)
        return branches.get(platform, default)(*arguments)

    monkeypatch.setattr(ops.lax, "platform_dependent", as_there)
    return taken
