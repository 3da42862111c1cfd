"""The parts of a vision transformer, and the gate that ARD needs.

PatchEmbed     images -> patch tokens
LayerNorm      with float32 statistics
Attention      multi-head self-attention over all tokens
Mlp            the two-layer perceptron of a block
Block          x + attention(norm(x)), then x + mlp(norm(x)), with any attention
scan_blocks    equal blocks as one scanned module
last_blocks    the same, down to the class token
multiply_adds  of blocks
drop_path      stochastic depth, per example
gate_gradient  a branch whose backward pass a Boolean switches off (ARD)

Shapes: b batch, n tokens, d width, h heads. Matrix products run in ``dtype``; parameters, softmax
and LayerNorm statistics stay in float32 (float64 where ``dtype`` is float64).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_at.models import ops

# As the original ViT. timm's truncated normal of 0.02 does not know the width, and narrow models
# trained from scratch with SGD then hardly learn.
KERNEL_INIT = nn.initializers.xavier_uniform()
EMBEDDING_INIT = nn.initializers.truncated_normal(0.02)


def param_dtype(dtype: str) -> jnp.dtype:
    """float32, or float64 for the exact checks."""
    return jnp.promote_types(dtype, jnp.float32)


class PatchEmbed(nn.Module):
    """Cuts [b, H, W, C] images into patches in row-major order and projects each to width d.

    The kernel has the layout of a Flax convolution, [patch, patch, C, d]. With the stride equal to
    the kernel the convolution is one matrix product over the flattened patches.
    """

    patch_size: int
    embed_dim: int
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        b, height, width, channels = images.shape
        p = self.patch_size
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
            (p, p, channels, self.embed_dim),
            param_dtype(self.dtype),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.embed_dim,), param_dtype(self.dtype))
        patches = images.reshape(b, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * channels)
        tokens = patches.astype(self.dtype) @ kernel.reshape(-1, self.embed_dim).astype(self.dtype)
        return tokens + bias.astype(self.dtype)


def dense(features: int, dtype: str, *, use_bias: bool = True, name: str | None = None) -> nn.Dense:
    """A linear layer with this project's initialisation and precision."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype(dtype),
        kernel_init=KERNEL_INIT,
        name=name,
    )


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with float32 statistics; its result is of ``dtype``."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, weights = (x.shape[-1],), param_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, shape, weights)
        bias = self.param("bias", nn.initializers.zeros, shape, weights)
        return ops.layer_norm(x.astype(self.dtype), scale, bias, self.epsilon)


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """softmax(scale * q k) v for q, k, v [b, n, h, head_dim].

    The softmax is in float32 at least. (jax.nn's own is in float32 always, too coarse for the
    float64 checks.)
    """
    wide = param_dtype(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) * scale
    return jnp.einsum("bhqk,bkhd->bqhd", ops.softmax(logits).astype(v.dtype), v)


def head_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """The same of one head, for q, k, v [b, n, head_dim]."""
    wide = param_dtype(q.dtype)
    logits = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=wide) * scale
    return jnp.einsum("bqk,bkd->bqd", ops.softmax(logits).astype(v.dtype), v)


class QueryKeyValue(nn.Module):
    """Linear, to the queries of the first tokens and to the keys and values of all of them.

    The features of the kernel [d, 3 d] are [q | k | v], as in timm.
    """

    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, queries: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [b, n, d] -> q [b, queries, d], k [b, n, d], v [b, n, d]."""
        d, weights, init = x.shape[-1], param_dtype(self.dtype), nn.initializers.zeros
        kernel = self.param("kernel", KERNEL_INIT, (d, 3 * d), weights)
        bias = self.param("bias", init, (3 * d,), weights) if self.use_bias else None

        def linear(x, features):
            out = x.astype(self.dtype) @ kernel[:, features].astype(self.dtype)
            return out if bias is None else out + bias[features].astype(self.dtype)

        if queries == x.shape[1]:
            q, k, v = jnp.split(linear(x, slice(None)), 3, -1)
        else:
            q = linear(x[:, :queries], slice(d))
            k, v = jnp.split(linear(x, slice(d, None)), 2, -1)
        return q, k, v


class Attention(nn.Module):
    """Multi-head self-attention; the qkv features are [q | k | v], each heads x head_dim."""

    num_heads: int
    qkv_bias: bool
    qk_scale: float  # of the attention logits; 0: head_dim ** -0.5
    dtype: str
    class_token_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d], or [b, 1, d] of the class token, which attends to all tokens."""
        b, n, d = x.shape
        head_dim, queries = d // self.num_heads, 1 if self.class_token_only else n
        qkv = QueryKeyValue(self.qkv_bias, self.dtype, name="qkv")(x, queries)
        scale = self.qk_scale or head_dim**-0.5
        if jax.default_backend() == "cpu":  # slices, where all heads at once are transpositions
            parts = (jnp.split(part, self.num_heads, -1) for part in qkv)
            heads = [head_attention(*of_head, scale) for of_head in zip(*parts, strict=True)]
            out = jnp.concatenate(heads, -1)
        else:
            q, k, v = (part.reshape(b, -1, self.num_heads, head_dim) for part in qkv)
            out = dot_product_attention(q, k, v, scale).reshape(b, queries, d)
        return dense(d, self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    hidden_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        x = dense(self.hidden_dim, self.dtype, name="fc1")(x)
        x = ops.gelu(x)
        return dense(d, self.dtype, name="fc2")(x)


def drop_path(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """Zeroes x [b, ...] for a share ``rate`` of the examples and rescales the others.

    Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_gradient(
    branch: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array, keep: jax.Array
) -> jax.Array:
    """``branch(params, x)`` in value; its gradient passes only where the scalar ``keep`` is True.

    Equals ``keep * a + (1 - keep) * stop_gradient(a)`` with a = branch(params, x) in value and
    gradient, but the backward pass of a masked branch is not computed at all.
    """
    del keep
    return branch(params, x)


def _gate_forward(branch, params, x, keep):
    differentiated = any(leaf.perturbed for leaf in jax.tree.leaves(params))
    params, x, keep = jax.tree.map(lambda leaf: leaf.value, (params, x, keep))
    if differentiated:
        out, vjp = jax.vjp(branch, params, x)
    else:  # an attack: what lax.cond returned would be computed even if nobody used it
        out, vjp = jax.vjp(functools.partial(branch, params), x)
    return out, (vjp, keep)


def _gate_backward(branch, residuals, cotangent):
    del branch
    vjp, keep = residuals
    blocked = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(vjp, cotangent))
    *to_params, to_x = lax.cond(keep, vjp, lambda _: blocked, cotangent)
    return (to_params[0] if to_params else None, to_x, None)


gate_gradient.defvjp(_gate_forward, _gate_backward, symbolic_zeros=True)


def attention_branch(
    norm: nn.Module, attention: nn.Module, x: jax.Array, keep: jax.Array | None
) -> jax.Array:
    """attention(norm(x)), the residual branch that ARD cuts off.

    norm, attention: bound submodules of the calling block, which owns their parameters.
    keep: scalar bool, False stops the gradient through the branch; None: no gate at all.
    """
    if keep is None:
        return attention(norm(x))
    norm, norm_variables = norm.unbind()
    attention, attention_variables = attention.unbind()

    def branch(variables, x):
        return attention.apply(variables[1], norm.apply(variables[0], x))

    return gate_gradient(branch, (norm_variables, attention_variables), x, keep)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); ``attention(name=...)`` makes the former.

    Of the tokens whose attention is not computed, the last ones, the block returns nothing.
    """

    attention: Callable[..., nn.Module]
    mlp_ratio: float
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None, drop_rate: jax.Array, train: bool
    ) -> tuple[jax.Array, None]:
        """x [b, n, d]; keep, drop_rate: this block's scalars. Stochastic depth: attention only."""
        norm1 = LayerNorm(self.norm_eps, self.dtype, name="norm1")
        a = attention_branch(norm1, self.attention(name="attn"), x, keep)
        if train and self.has_rng("drop_path"):
            a = drop_path(self.make_rng("drop_path"), a, drop_rate)
        x = x[:, : a.shape[1]] + a
        hidden_dim = int(x.shape[-1] * self.mlp_ratio)
        y = LayerNorm(self.norm_eps, self.dtype, name="norm2")(x)
        return x + Mlp(hidden_dim, self.dtype, name="mlp")(y), None


def scan_blocks(
    block: type[nn.Module], length: int, remat: bool = False
) -> Callable[..., nn.Module]:
    """``length`` equal blocks in a row, called as (x, keep, drop_rate, train) -> (x, None).

    Their parameters are stacked along axis 0, as are keep and drop_rate, with a row per block. The
    program holds one block, so compile time does not grow with depth. remat: a gradient keeps the
    input of each block alone, and computes the block once more.
    """
    if remat:
        block = nn.remat(block, prevent_cse=False, static_argnums=(4,))
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "drop_path": True},
        in_axes=(0, 0, nn.broadcast),
        length=length,
    )


def last_blocks(
    attention: Callable[..., nn.Module],
    block: tuple[float, float, str],
    x: jax.Array,
    keep: jax.Array | None,
    drop_rates: jax.Array,
    train: bool,
    remat: bool,
) -> jax.Array:
    """x [b, n, d] -> the class token [b, d] after all blocks, a row of ``drop_rates`` for each.

    Nothing reads the other tokens of the last block, so that one, ``last_block``, computes none of
    them: a twelfth of the work of twelve blocks, nearly. The others are the stack ``blocks``.
    """
    count = len(drop_rates) - 1
    first, last = (None, None) if keep is None else (keep[:count], keep[count])
    if count:
        blocks = scan_blocks(Block, count, remat)(attention, *block, name="blocks")
        x, _ = blocks(x, first, drop_rates[:count], train)
    class_token = functools.partial(attention, class_token_only=True)
    x, _ = Block(class_token, *block, name="last_block")(x, last, drop_rates[count], train)
    return x[:, 0]


def multiply_adds(
    blocks: Sequence[tuple[int, int, int]], d: int, mlp_ratio: float
) -> tuple[float, float]:
    """Of all blocks' linear layers, and of their products of two activations, for one image.

    blocks: (number of such blocks, tokens, queries) of each kind. Keys and values are computed of
      all tokens, all else of the queries alone.
    """
    linear = sum(n * d * d * (2 * t + q * (2 + 2 * mlp_ratio)) for n, t, q in blocks)
    return linear, sum(n * 2.0 * q * t * d for n, t, q in blocks)
