"""The layers of a vision transformer, and the gate through which ARD acts.

dense          a linear layer
resize_positions  a position embedding for smaller images
LayerNorm      with float32 statistics
DepthwiseConv  a convolution channel by channel
Mlp            the two-layer perceptron of a block
drop_path      leaves a residual branch out for some examples (stochastic depth)
gate_gradient  a branch whose backward pass a Boolean switches off (ARD)

Shapes: b batch, n tokens, d width, h heads. Matrix products run in ``dtype``; parameters, softmax
and LayerNorm statistics stay in float32 (float64 where ``dtype`` is float64).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_at.models import convolution, ops

# As in the original ViT. timm's truncated normal of 0.02 ignores the width: with it, narrow models
# hardly learn from scratch with SGD.
KERNEL_INIT = nn.initializers.xavier_uniform()
EMBEDDING_INIT = nn.initializers.truncated_normal(0.02)


def param_dtype(dtype: str) -> jnp.dtype:
    """float32, or float64 for the exact checks."""
    return jnp.promote_types(dtype, jnp.float32)


def conv_fields(dtype: str) -> dict[str, Any]:
    """What all convolutions have in common: dtypes, and the product of this project."""
    weights = param_dtype(dtype)
    return {"dtype": dtype, "param_dtype": weights, "conv_general_dilated": _convolve}


def _convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **_: Any) -> jax.Array:
    """``convolution.convolve`` as Flax calls it; what is left out has its default."""
    if isinstance(padding, str):  # SAME or VALID
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return convolution.convolve(x, kernel, tuple(strides), tuple(padding))


def _linear(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """``ops.linear`` as Flax calls it; the dimensions are the last of x and the first of kernel."""
    del dimensions, precision
    return ops.linear(x, kernel)


def dense(features: int, dtype: str, **fields: Any) -> nn.Dense:
    """A linear layer with this project's precision and, unless told otherwise, initialisation.

    fields: of ``nn.Dense``.
    """
    ours = {"param_dtype": param_dtype(dtype), "kernel_init": KERNEL_INIT, "dot_general": _linear}
    return nn.Dense(features, dtype=dtype, **(ours | fields))


def resize_positions(positions: jax.Array, extra: int, tokens: int) -> jax.Array:
    """A position embedding [1, extra + old, d] for images of fewer patches, [1, extra + tokens, d].

    Grids are square; bilinear, averaged over what a patch covers. The extra tokens keep theirs.
    """
    old, new = round((positions.shape[1] - extra) ** 0.5), round(tokens**0.5)
    if old == new:
        return positions
    first, grid = positions[:, :extra], positions[:, extra:].reshape(1, old, old, -1)
    grid = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "linear")
    return jnp.concatenate([first, grid.reshape(1, tokens, -1)], axis=1)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with float32 statistics; the result has ``dtype``."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, weights = (x.shape[-1],), param_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, shape, weights)
        bias = self.param("bias", nn.initializers.zeros, shape, weights)
        return ops.layer_norm(x.astype(self.dtype), scale, bias, self.epsilon)


class DepthwiseConv(nn.Module):
    """A convolution of size x size pixels, size odd, of each channel with a kernel of its own."""

    size: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, H, W, d] -> [b, H, W, d]; zeros are padded."""
        d, weights = x.shape[-1], param_dtype(self.dtype)
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (self.size, self.size, 1, d), weights)
        bias = self.param("bias", nn.initializers.zeros, (d,), weights)
        x = convolution.depthwise(x.astype(self.dtype), kernel.astype(self.dtype))
        return x + bias.astype(self.dtype)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    hidden_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        x = ops.gelu(dense(self.hidden_dim, self.dtype, name="fc1")(x))
        return dense(d, self.dtype, name="fc2")(x)


def drop_path(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes x [b, ...] for a fraction ``rate`` of the examples and rescales the others.

    A rate of 1e-9 drops nothing: in float32, 1 less it is 1.

    Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_gradient(
    branch: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array, keep: jax.Array
) -> jax.Array:
    """``branch(params, x)`` in value; its gradient passes only where the scalar ``keep`` is True.

    With a = branch(params, x), value and gradient equal those of
    ``keep * a + (1 - keep) * stop_gradient(a)``, but the backward pass of a masked branch is not
    computed at all. ``training.masking`` draws ``keep``.
    """
    del keep
    return branch(params, x)


def _gate_forward(branch, params, x, keep):
    differentiated = any(leaf.perturbed for leaf in jax.tree.leaves(params))
    params, x, keep = jax.tree.map(lambda leaf: leaf.value, (params, x, keep))
    if differentiated:
        out, vjp = jax.vjp(branch, params, x)
    else:  # an attack: lax.cond would compute the gradient by the parameters, though unused
        out, vjp = jax.vjp(functools.partial(branch, params), x)
    return out, (vjp, keep)


def _gate_backward(branch, residuals, cotangent):
    del branch
    vjp, keep = residuals
    blocked = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(vjp, cotangent))
    *to_params, to_x = lax.cond(keep, vjp, lambda _: blocked, cotangent)
    return (to_params[0] if to_params else None, to_x, None)


gate_gradient.defvjp(_gate_forward, _gate_backward, symbolic_zeros=True)
