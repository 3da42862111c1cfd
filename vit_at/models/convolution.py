"""Convolutions with gradients that are fast on a CPU.

docs/performance.md says how much time they save.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from vit_at.models import ops

Array = jax.Array
Padding = Sequence[tuple[int, int]]


def conv_precision() -> str | None:
    """The ``precision`` of a convolution; None: that of the context.

    Contexts of ``distributed.precision`` name an algorithm of products, which convolutions have
    not: in XLA they would fall back to the lowest precision, TF32 on a GPU.
    """
    algorithm = str(jax.config.jax_default_matmul_precision or "")
    return "highest" if "_F32" in algorithm else None


def _convolution(
    x: Array, kernel: Array, strides: Sequence[int], padding: Padding, groups: int = 1
) -> Array:
    axes, precision = ("NHWC", "HWIO", "NHWC"), conv_precision()
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=axes,
        feature_group_count=groups,
        precision=precision,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Padding) -> Array:
    """x [b, H, W, c] convolved with kernel [k, l, c, d] of the same dtype, [b, H', W', d].

    padding: rows and columns of zeros, before and after. In a program for a CPU the gradients are
    matrix products for each of the kernel's k l places: there XLA's own take several times as long,
    that by the kernel of a part of a batch thirty times.
    """
    return _convolution(x, kernel, strides, padding)


def _convolve_forward(x, kernel, strides, padding):
    return convolve(x, kernel, strides, padding), (x, kernel)


def _convolve_backward(strides, padding, residuals, cotangent):
    sizes = {"strides": strides, "padding": padding}

    def by_xla(x, kernel, cotangent):
        return jax.vjp(functools.partial(_convolution, **sizes), x, kernel)[1](cotangent)

    by_places = functools.partial(_by_places, **sizes)
    return lax.platform_dependent(*residuals, cotangent, cpu=by_places, default=by_xla)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _by_places(x, kernel, cotangent, strides, padding):
    """Gradients of ``convolve`` by x and by kernel, summed over the kernel's places."""
    (b, h, w, d), c = cotangent.shape, x.shape[-1]
    rows = cotangent.reshape(-1, d)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    steps = (1, *strides, 1)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    to_x, to_kernel = jnp.zeros(padded.shape, dtype), []
    for i, j in itertools.product(*map(range, kernel.shape[:2])):
        # The pixels that this place of the kernel sees: every stride-th, from (i, j) on.
        start = (0, i, j, 0)
        end = (b, i + (h - 1) * strides[0] + 1, j + (w - 1) * strides[1] + 1, c)
        seen = lax.slice(padded, start, end, steps)
        to_kernel.append(ops.product(seen.reshape(-1, c), rows, [0], [0]))
        back = lax.dot(rows, kernel[i, j].T, preferred_element_type=dtype).reshape(seen.shape)
        around = [
            (s, n - e, step - 1)
            for s, n, e, step in zip(start, padded.shape, end, steps, strict=True)
        ]
        to_x += lax.pad(back, jnp.zeros((), dtype), around)
    (top, _), (left, _) = padding
    to_x = to_x[:, top : top + x.shape[1], left : left + x.shape[2]]
    return to_x.astype(x.dtype), jnp.stack(to_kernel).reshape(kernel.shape)


@jax.custom_vjp
def depthwise(x: Array, kernel: Array) -> Array:
    """x [b, H, W, d] convolved with kernel [k, k, 1, d], k odd, channel by channel; keeps H and W.

    The gradient by the kernel is a sum for each of its k² places. XLA's own takes twenty times as
    long on a CPU.
    """
    margin = kernel.shape[0] // 2
    return _convolution(x, kernel, (1, 1), [(margin, margin)] * 2, groups=x.shape[-1])


def _depthwise_forward(x, kernel):
    residuals = (x.value if kernel.perturbed else None, kernel.value)
    return depthwise(x.value, kernel.value), residuals


def _depthwise_backward(residuals, cotangent):
    x, kernel = residuals
    to_x = depthwise(cotangent, kernel[::-1, ::-1])
    if x is None:
        return to_x, None
    k, shape = kernel.shape[0], cotangent.shape
    margin = (k // 2, k // 2)
    padded = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))

    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def at(place):
        seen = lax.dynamic_slice(padded, (0, place // k, place % k, 0), shape)
        return (seen.astype(dtype) * cotangent.astype(dtype)).sum((0, 1, 2))

    return to_x, lax.map(at, jnp.arange(k * k)).reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward, symbolic_zeros=True)
