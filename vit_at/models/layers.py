"""The parts of a vision transformer, and the gate that ARD needs.

PatchEmbed     images -> patch tokens
LayerNorm      with float32 statistics
Attention      multi-head self-attention over all tokens
Mlp            the two-layer perceptron of a block
Block          x + attention(norm(x)), then x + mlp(norm(x)), with any attention
run_blocks     equal blocks in a row, scanned or one by one
last_blocks    the same, down to the class token
multiply_adds  of blocks
stochastic_depth, drop_path   which examples leave out which attention
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
        kernel = kernel.reshape(-1, self.embed_dim).astype(self.dtype)
        tokens = ops.linear(patches.astype(self.dtype), kernel)
        return tokens + bias.astype(self.dtype)


def _linear(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """``ops.linear`` as Flax calls it; the dimensions are the last of x and the first of kernel."""
    del dimensions, precision
    return ops.linear(x, kernel)


def dense(
    features: int,
    dtype: str,
    *,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = KERNEL_INIT,
    name: str | None = None,
) -> nn.Dense:
    """A linear layer with this project's initialisation and precision."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype(dtype),
        kernel_init=kernel_init,
        dot_general=_linear,
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
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=wide) * scale
    out = jnp.einsum("bhqk,bhkd->bhqd", ops.softmax(logits).astype(v.dtype), v)
    return out.transpose(0, 2, 1, 3)


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
            out = ops.linear(x.astype(self.dtype), kernel[:, features].astype(self.dtype))
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
        q, k, v = (part.reshape(b, -1, self.num_heads, head_dim) for part in qkv)
        out = dot_product_attention(q, k, v, self.qk_scale or head_dim**-0.5)
        out = out.reshape(b, queries, d)
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


def stochastic_depth(model: nn.Module, train: bool) -> tuple[jax.Array, jax.Array] | None:
    """(keys [depth], rates [depth]) for ``drop_path``, the rates growing from 0; None: no drops.

    Needs an rng 'drop_path'. The keys are drawn here for all blocks, so they are the same however
    the blocks are run.
    """
    if not (train and model.drop_path and model.has_rng("drop_path")):
        return None
    keys = jax.random.split(model.make_rng("drop_path"), model.depth)
    return keys, jnp.linspace(0.0, model.drop_path, model.depth)


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
        self,
        x: jax.Array,
        keep: jax.Array | None,
        drop: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, None]:
        """x [b, n, d]; keep: scalar bool (ARD); drop: (key, rate) of stochastic depth, or None."""
        norm1 = LayerNorm(self.norm_eps, self.dtype, name="norm1")
        a = attention_branch(norm1, self.attention(name="attn"), x, keep)
        if drop is not None:
            key, rate = drop
            a = drop_path(key, a, rate)
        x = x[:, : a.shape[1]] + a
        hidden_dim = int(x.shape[-1] * self.mlp_ratio)
        y = LayerNorm(self.norm_eps, self.dtype, name="norm2")(x)
        return x + Mlp(hidden_dim, self.dtype, name="mlp")(y), None


Switches = tuple[jax.Array | None, Any]  # (keep, drop) of some blocks, a row each; None: off


def rows(switches: Switches, which: slice | int) -> Switches:
    """The switches of some of the blocks."""
    return jax.tree.map(lambda of_all: of_all[which], switches)


def run_blocks(
    parent: nn.Module,
    name: str,
    count: int,
    block: Callable[..., nn.Module],
    x: jax.Array,
    switches: Switches,
    remat: bool,
) -> jax.Array:
    """x after ``count`` equal blocks in a row, the children ``name`` of ``parent``.

    Their parameters are stacked along axis 0, and the blocks are scanned: the program holds one of
    them, so compile time does not grow with depth. Or they are a tuple with a tree for each block
    (``models.Classifier.by_block``), and the blocks are laid out one by one: longer to compile, but
    nothing is copied from and to stacks, which on a CPU costs more than it saves.

    block: a functools.partial of a module's class, called as (x, *its switches) -> (x, None).
    remat: a gradient keeps the input of each block alone, and computes the block once more.
    """
    stack = None if parent.is_initializing() else parent.get_variable("params", name)
    if isinstance(stack, tuple):

        @jax.jit  # for tracing alone: once instead of for every block
        def run(params, x, switches):
            return block(parent=None).apply({"params": params}, x, *switches)[0]

        run = jax.checkpoint(run) if remat else run
        for i, params in enumerate(stack):
            x = run(params, x, rows(switches, i))
        return x
    kind = nn.remat(block.func, prevent_cse=False) if remat else block.func
    scanned = nn.scan(
        kind,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=0,
        length=count,
    )
    return scanned(*block.args, name=name)(x, *switches)[0]


def last_blocks(
    parent: nn.Module,
    attention: Callable[..., nn.Module],
    fields: tuple[float, float, str],
    x: jax.Array,
    count: int,
    switches: Switches,
    remat: bool,
) -> jax.Array:
    """x [b, n, d] -> the class token [b, d] after ``count`` blocks with these ``fields``.

    Nothing reads the other tokens of the last block, so that one, ``last_block``, computes none of
    them: a twelfth of the work of twelve blocks, nearly. The others are the stack ``blocks``.
    """
    if count > 1:
        block = functools.partial(Block, attention, *fields)
        first = rows(switches, slice(count - 1))
        x = run_blocks(parent, "blocks", count - 1, block, x, first, remat)
    class_token = functools.partial(attention, class_token_only=True)
    x, _ = Block(class_token, *fields, name="last_block")(x, *rows(switches, count - 1))
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
