"""GELU, LayerNorm, softmax, attention and linear layers with their gradients.

All but the last are bound by memory, and automatic differentiation keeps several arrays of each for
the backward pass. Written out, GELU keeps only its input, LayerNorm its input and two numbers per
token, a softmax its result. Values and gradients equal the textbook formulas up to rounding;
docs/performance.md says how much time each saves.

Everything is computed in float32 (float64 for float64 inputs) and returned in the input's dtype, or
the one that is asked for. The products of ``linear`` have the input's dtype and accumulate in
float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _gelu_cdf(x: Array) -> Array:
    """Phi(x) of the normal distribution, in float32 at least."""
    return 0.5 * (1 + lax.erf(_wide(x) * math.sqrt(0.5)))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Exact GELU, x Phi(x) (Hendrycks and Gimpel 2016), in the form that PyTorch computes."""
    return (_wide(x) * _gelu_cdf(x)).astype(x.dtype)


def _gelu_backward(x, cotangent):
    # Without the barrier, XLA would keep Phi(x) of the forward pass for the backward pass.
    x, cotangent = lax.optimization_barrier((x, cotangent))
    density = jnp.exp(-0.5 * _wide(x) ** 2) * (1 / math.sqrt(2 * math.pi))
    derivative = _gelu_cdf(x) + _wide(x) * density
    return ((_wide(cotangent) * derivative).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis (Ba et al. 2016).

    scale, bias: [d], float32 at least. The variance is of the centred values, as PyTorch's; that of
    bfloat16 on a TPU is the mean square less the squared mean, as Flax's.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    mean, inverse = _statistics(x, epsilon)
    value = (_wide(x) - mean) * (inverse * scale) + bias
    return value.astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, residuals, cotangent):
    *kept, scale = residuals
    x, mean, inverse = _recomputed(kept, epsilon) if kept[0].dtype == jnp.bfloat16 else kept
    normalised = (_wide(x) - mean) * inverse
    cotangent = _wide(cotangent)
    scaled = cotangent * scale
    along = (scaled * normalised).mean(-1, keepdims=True)
    to_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normalised * along)
    rows = tuple(range(x.ndim - 1))
    return to_x.astype(x.dtype), (cotangent * normalised).sum(rows), cotangent.sum(rows)


def _statistics(x: Array, epsilon: float) -> tuple[Array, Array]:
    """The mean and 1 / sqrt(variance + epsilon) over the last axis, which stays with size 1."""
    wide = _wide(x)
    mean = wide.mean(-1, keepdims=True)

    def of_centred(wide, mean):
        return ((wide - mean) ** 2).mean(-1, keepdims=True)

    def of_squares(wide, mean):  # one pass less; float32 holds the squares of bfloat16 exactly
        return jnp.maximum((wide**2).mean(-1, keepdims=True) - mean**2, 0)

    if x.dtype == jnp.bfloat16:
        variance = lax.platform_dependent(wide, mean, tpu=of_squares, default=of_centred)
    else:
        variance = of_centred(wide, mean)
    return mean, lax.rsqrt(variance + epsilon)


def _recomputed(kept: Sequence[Array], epsilon: float) -> tuple[Array, Array, Array]:
    """x and its statistics: on a GPU from x, which is read anyway, so it costs no traffic."""

    def again(x, *_):
        x = lax.optimization_barrier(x)
        return x, *_statistics(x, epsilon)

    return lax.platform_dependent(*kept, cuda=again, default=lambda *kept: kept)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(logits: Array, dtype: Any) -> Array:
    """Softmax over the last axis, computed after subtracting the largest logit.

    Computed in float32 at least; returned, and kept for the gradient, in ``dtype``.
    """
    return jax.nn.softmax(_wide(logits)).astype(dtype)


def _softmax_forward(logits, dtype):
    value = softmax(logits, dtype)
    return value, (value, jnp.zeros(0, logits.dtype))


def _softmax_backward(dtype, residuals, cotangent):
    del dtype
    value, like_logits = residuals
    return (_to_logits(value, cotangent).astype(like_logits.dtype),)


def _to_logits(value: Array, cotangent: Array) -> Array:
    """The gradient of a softmax by its logits, float32 at least."""
    value, cotangent = _wide(value), _wide(cotangent)
    return value * (cotangent - (value * cotangent).sum(-1, keepdims=True))


softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_weights(q: Array, k: Array, scale: float) -> Array:
    """softmax(scale q k^T) over the keys, [..., queries, keys].

    q [..., queries, c], k [..., keys, c]. Logits and softmax are float32 at least; what is kept for
    the gradient, and what is multiplied, has the dtype of q, as the result has.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("...qc,...kc->...qk", q, k, preferred_element_type=wide) * scale
    return jax.nn.softmax(logits).astype(q.dtype)


def _attention_weights_forward(q, k, scale):
    weights = attention_weights(q, k, scale)
    return weights, (q, k, weights)


def _attention_weights_backward(scale, residuals, cotangent):
    q, k, weights = residuals
    to_product = (_to_logits(weights, cotangent) * scale).astype(q.dtype)
    to_q = _by_platform(functools.partial(jnp.einsum, "...qk,...kc->...qc"), to_product, k)
    to_k = _by_platform(functools.partial(jnp.einsum, "...qk,...qc->...kc"), to_product, q)
    return to_q, to_k


attention_weights.defvjp(_attention_weights_forward, _attention_weights_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pool(q: Array, x: Array, scale: float) -> tuple[Array, Array]:
    """(weights x, weights) of the weights softmax(scale q x^T): x is the keys and the values.

    q [b, queries, d], x [b, n, d] -> [b, queries, d], weights [b, queries, n] without a gradient.
    For few queries: on a GPU, products with so few rows are sums, as XLA would pad them to eight.
    """
    weights = softmax(_rows_by_tokens(q, x) * scale, q.dtype)
    return _weighted_tokens(weights, x), weights


def _rows_by_tokens(rows: Array, x: Array) -> Array:
    """rows [b, queries, d] times x [b, n, d] -> [b, queries, n], float32 at least."""

    def product(rows, x):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("bqd,bnd->bqn", rows, x, preferred_element_type=wide)

    def sums(rows, x):
        return (_wide(rows)[:, :, None] * _wide(x)[:, None]).sum(-1)

    return lax.platform_dependent(rows, x, cuda=sums, default=product)


def _weighted_tokens(weights: Array, x: Array) -> Array:
    """weights [b, queries, n] times x [b, n, d] -> [b, queries, d]."""

    def sums(weights, x):
        return (_wide(weights)[..., None] * _wide(x)[:, None]).sum(2).astype(x.dtype)

    product = functools.partial(jnp.einsum, "bqn,bnd->bqd")
    return lax.platform_dependent(weights, x, cuda=sums, default=product)


def _pool_forward(q, x, scale):
    pooled, weights = pool(q, x, scale)
    return (pooled, weights), (q, x, weights)


def _pool_backward(scale, residuals, cotangents):
    (q, x, weights), (cotangent, _) = residuals, cotangents
    to_product = (_to_logits(weights, _rows_by_tokens(cotangent, x)) * scale).astype(q.dtype)

    def product(*pairs):  # through the logits and through the sum at once
        left, right = (jnp.concatenate(pair, 1) for pair in pairs)
        return jnp.einsum("bqn,bqd->bnd", left, right)

    def sums(*pairs):
        both = (
            (_wide(w)[..., None] * _wide(y)[:, :, None]).sum(1) for w, y in zip(*pairs, strict=True)
        )
        return sum(both).astype(x.dtype)

    pairs = (to_product, weights), (q, cotangent)
    to_x = lax.platform_dependent(*pairs, cuda=sums, default=product)
    return _weighted_tokens(to_product, x), to_x


pool.defvjp(_pool_forward, _pool_backward)


def linear(x: Array, kernel: Array) -> Array:
    """x [..., d] @ kernel [d, features], both of one dtype.

    In bfloat16, a program for a CPU computes the products, and those of the gradients, in float32
    and rounds once after: only then does XLA use the matrix units that some processors have.
    """
    return _bfloat16_product(x, kernel) if x.dtype == jnp.bfloat16 else x @ kernel


def product(a: Array, b: Array, axes_a: Sequence[int], axes_b: Sequence[int]) -> Array:
    """The sum over axes of two arrays in their dtype, by what suits the program's platform."""
    dimensions = ((tuple(axes_a), tuple(axes_b)), ((), ()))
    return _by_platform(functools.partial(lax.dot_general, dimension_numbers=dimensions), a, b)


def _by_platform(product: Callable[..., Array], a: Array, b: Array) -> Array:
    """product(a, b) in the dtype of both; in bfloat16 on a CPU, in float32 and rounded after."""

    def on_cpu(a, b):
        return product(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    if a.dtype != jnp.bfloat16:
        return product(a, b)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=product)


@jax.custom_vjp
def _bfloat16_product(x: Array, kernel: Array) -> Array:
    return product(x, kernel, [x.ndim - 1], [0])


def _product_forward(x, kernel):
    # Each operand is kept only for the gradient by the other: an attack keeps no activations.
    residuals = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _bfloat16_product(x.value, kernel.value), residuals


def _product_backward(residuals, cotangent):
    x, kernel = residuals
    last, leading = cotangent.ndim - 1, range(cotangent.ndim - 1)
    to_x = None if kernel is None else product(cotangent, kernel, [last], [1])
    # Not of flattened rows: a TPU lays out what a layer reads and writes in another order.
    return to_x, None if x is None else product(x, cotangent, leading, leading)


_bfloat16_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
