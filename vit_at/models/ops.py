"""GELU, LayerNorm, softmax and linear layers with their gradients written out.

The first three are the parts of a transformer that are bound by memory, and automatic
differentiation keeps several arrays of each for the backward pass. Written out, GELU keeps its
input and nothing else, LayerNorm its input and two numbers per token, softmax its result. Values
and gradients are those of the textbook formulas, to rounding; docs/performance.md has what each is
worth.

Everything is computed in float32 (float64 for float64 inputs) and returned in the input's dtype.
The products of ``linear`` are of the input's dtype, too, and add up in float32.
"""

import functools
import math

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
    # Without the barrier, XLA would see Phi(x) of the forward pass and keep it, too.
    x, cotangent = lax.optimization_barrier((x, cotangent))
    density = jnp.exp(-0.5 * _wide(x) ** 2) * (1 / math.sqrt(2 * math.pi))
    derivative = _gelu_cdf(x) + _wide(x) * density
    return ((_wide(cotangent) * derivative).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


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


def linear(x: Array, kernel: Array) -> Array:
    """x [..., d] @ kernel [d, features], both of one dtype.

    On a CPU in bfloat16, the products and those of the gradients are asked for in float32 and
    rounded after: XLA runs them on the processor's matrix units, where it has some, only then.
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        rows = _cpu_bfloat16_product(x.reshape(-1, x.shape[-1]), kernel)
        return rows.reshape(*x.shape[:-1], -1)
    return x @ kernel


def _product_in_float32(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    dimensions = (tuple((axis,) for axis in contracted), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def _cpu_bfloat16_product(x: Array, kernel: Array) -> Array:
    return _product_in_float32(x, kernel, (1, 0))


def _product_backward(residuals, cotangent):
    x, kernel = residuals
    to_x = _product_in_float32(cotangent, kernel, (1, 1))
    return to_x, _product_in_float32(x, cotangent, (0, 0))


_cpu_bfloat16_product.defvjp(lambda *args: (_cpu_bfloat16_product(*args), args), _product_backward)
