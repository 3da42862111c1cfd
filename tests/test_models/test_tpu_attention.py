"""The kernel of attention on TPUs, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tpu_blocks

from vit_at.models import tpu_attention


def attention(qkv, num_heads, scale):
    """The formula; qkv [3, n, b, d] -> [n, b, d]."""
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in qkv)
    weights = jax.nn.softmax(scale * jnp.einsum("qbhc,kbhc->bhqk", q, k))
    return jnp.einsum("bhqk,kbhc->qbhc", weights, v).reshape(qkv.shape[1:])


@pytest.mark.parametrize(
    ("tokens", "images", "width", "heads"),
    [
        (17, 16, 192, 3),  # half of the last lanes are beyond the array
        runs.slow(5, 8, 256, 4),
        runs.slow(8, 8, 160, 5),  # four heads in the lanes, then one
        (3, 8, 128, 1),
        runs.slow(131, 8, 64, 1),  # more rows than lanes
    ],
)
def test_the_kernel_is_attention(tokens, images, width, heads, monkeypatch):
    tpu_blocks.stand_in(monkeypatch, tpu_attention)
    key, other = jax.random.split(jax.random.key(0))
    qkv = 2 * jax.random.normal(key, (3, tokens, images, width), jnp.bfloat16)
    cotangent = jax.random.normal(other, (tokens, images, width), jnp.bfloat16)
    assert tpu_attention.takes(tokens, images, width // heads)

    scale = 0.7 * (width // heads) ** -0.5
    result, back = jax.vjp(lambda x: tpu_attention.attend(x, heads, scale), qkv)
    (gradient,) = back(cotangent)
    assert result.dtype == gradient.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (qkv, cotangent)]
        expected, back = jax.vjp(lambda x: attention(x, heads, scale), wide[0])
        (expected_gradient,) = back(wide[1])
    for part, name in ((result, "out"), *zip(gradient, ("q", "k", "v"), strict=True)):
        whole = dict(zip("qkv", expected_gradient, strict=True)) | {"out": expected}
        difference = np.asarray(part, np.float64) - np.asarray(whole[name])
        assert np.abs(difference).max() < 0.02 * np.abs(whole[name]).max(), name


def test_large_logits_do_not_overflow(monkeypatch):
    tpu_blocks.stand_in(monkeypatch, tpu_attention)
    qkv = jnp.full((3, 4, 8, 64), 30.0, jnp.bfloat16)
    np.testing.assert_array_equal(tpu_attention.attend(qkv, 1, 1.0), 30.0)


def test_sizes_that_the_kernel_lacks():
    assert tpu_attention.takes(65, 8, 64)
    assert not tpu_attention.takes(577, 8, 64)  # 384 pixels
    assert not tpu_attention.takes(65, 12, 64)
    assert not tpu_attention.takes(65, 8, 96)


@pytest.mark.parametrize(("tokens", "width", "heads"), [(65, 192, 3), (197, 768, 12)])
def test_the_kernel_is_lowered_for_a_tpu(tokens, width, heads):
    def both(qkv, cotangent):
        out, back = jax.vjp(lambda x: tpu_attention.attend(x, heads, 0.125), qkv)
        return out, back(cotangent)

    shapes = ((3, tokens, 16, width), (tokens, 16, width))
    traced = jax.jit(both).trace(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2
