"""GELU, LayerNorm and softmax with their gradients written out.

These are the parts of a transformer that are bound by memory, and automatic differentiation keeps
several arrays of each for the backward pass. Written out, GELU keeps its derivative and nothing
else, LayerNorm its input and two numbers per token, softmax its result. Values and gradients are
those of the textbook formulas, to rounding; docs/performance.md has what each is worth.

Everything is computed in float32 (float64 for float64 inputs) and returned in the input's dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _gelu(x: Array) -> tuple[Array, Array]:
    """x Phi(x) in x's dtype, and Phi(x) in float32 at least."""
    cdf = 0.5 * (1 + lax.erf(_wide(x) * math.sqrt(0.5)))
    return (_wide(x) * cdf).astype(x.dtype), cdf


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Exact GELU, x Phi(x) (Hendrycks and Gimpel 2016), in the form that PyTorch computes."""
    return _gelu(x)[0]


def _gelu_forward(x):
    value, cdf = _gelu(x)
    density = jnp.exp(-0.5 * _wide(x) ** 2) * (1 / math.sqrt(2 * math.pi))
    return value, (cdf + _wide(x) * density).astype(x.dtype)


gelu.defvjp(_gelu_forward, lambda derivative, cotangent: (cotangent * derivative,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis (Ba et al. 2016).

    scale, bias: [d], float32 at least. The variance is of the centred values, as PyTorch's.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    wide = _wide(x)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    inverse = lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    value = centred * (inverse * scale) + bias
    return value.astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, residuals, cotangent):
    del epsilon
    x, mean, inverse, scale = residuals
    normalised = (_wide(x) - mean) * inverse
    cotangent = _wide(cotangent)
    scaled = cotangent * scale
    along = (scaled * normalised).mean(-1, keepdims=True)
    to_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normalised * along)
    rows = tuple(range(x.ndim - 1))
    return to_x.astype(x.dtype), (cotangent * normalised).sum(rows), cotangent.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def softmax(logits: Array) -> Array:
    """Softmax over the last axis, with the largest logit taken off first."""
    return jax.nn.softmax(_wide(logits)).astype(logits.dtype)


def _softmax_forward(logits):
    value = softmax(logits)
    return value, value


def _softmax_backward(value, cotangent):
    value, cotangent, dtype = _wide(value), _wide(cotangent), value.dtype
    centred = cotangent - (value * cotangent).sum(-1, keepdims=True)
    return ((value * centred).astype(dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)
