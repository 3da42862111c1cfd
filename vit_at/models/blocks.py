"""Transformer blocks: one of them, and many in a row.

Transformer       what the architectures have in common
Block             x + attention(norm(x)), then x + mlp(norm(x)), with any attention
run_blocks        equal blocks in a row, scanned or one by one
last_blocks       the same, a last block that computes the class token alone, and its norm
stochastic_depth  which blocks drop their attention how often
stack_blocks      parameters as they were before ``models.unstack_blocks``
multiply_adds     cost of blocks
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import layout

from vit_at.models import layers
from vit_at.models import stem as stems
from vit_at.models.layers import LayerNorm, Mlp, drop_path, gate_gradient

LINEAR = ("qkv", "qk", "v", "proj", "fc1", "fc2")  # layers of a block that run in ``dtype``
Drop = tuple[jax.Array, jax.Array] | None  # (key, rate) of stochastic depth; None: no drops
Switches = tuple[jax.Array | None, Any]  # (keep, drop), one row per block; None: off


class Transformer(nn.Module, kw_only=True):
    """What the architectures have in common: a stem first, a linear head last.

    stem: 'patch' or 'conv', see ``stem``.
    qk_scale: of the attention logits; 0: head_dim ** -0.5. drop_path: rate of stochastic depth in
    the last block. remat: see ``run_blocks``.
    attention_kernel: "cudnn", "pallas" or "", see ``models.for_device``.
    """

    num_classes: int
    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    norm_eps: float
    in_channels: int = 3
    stem: str = "patch"
    qk_scale: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    attention_kernel: str = ""
    dtype: str = "float32"

    any_size: ClassVar[bool] = True  # takes smaller images than image_size, too

    @property
    def num_blocks(self) -> int:
        """Number of attention blocks, in forward order: the length of ``attn_grad_keep``."""
        return self.depth

    @property
    def num_tokens(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def batch_norms(self) -> tuple[str, ...]:
        """timm's names of the layers that are BatchNorm there; see ``weights.batch_norm``."""
        return ()

    @nn.compact
    def __call__(
        self, images: jax.Array, attn_grad_keep: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Logits [b, num_classes] of normalised images [b, H, W, C].

        attn_grad_keep: [num_blocks] bool; False: no gradient through that block's attention.
        train: stochastic depth, if an rng 'drop_path' is given.
        """
        x = self._embed()(images)
        return self._logits(self._features(x, (attn_grad_keep, stochastic_depth(self, train))))

    def _embed(self) -> nn.Module:
        """The module from images [b, H, W, C] to patches."""
        return stems.create(self.stem, self.patch_size, self.embed_dim, self.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        """Features [b, d] -> logits [b, num_classes]."""
        return self._head("head", x)

    def _head(self, name: str, x: jax.Array) -> jax.Array:
        return layers.dense(self.num_classes, layers.param_dtype(self.dtype), name=name)(x)

    @abc.abstractmethod
    def _features(self, x: jax.Array, switches: Switches) -> jax.Array:
        """Patches [b, num_tokens, embed_dim] -> what the head reads, [b, d]."""

    def forward_flops(self) -> float:
        """Floating-point operations of one image's forward pass (a multiply-add counts as two)."""
        return 2.0 * sum(self.multiply_adds())

    def stem_multiply_adds(self) -> float:
        """Multiply-adds of the stem, for one image."""
        sizes = (self.image_size, self.patch_size, self.embed_dim, self.in_channels)
        return stems.multiply_adds(self.stem, *sizes)

    @abc.abstractmethod
    def multiply_adds(self) -> tuple[float, float]:
        """(in linear layers, in products of two activations), for one image."""


class Unstacked(flax.struct.PyTreeNode):
    """The parameters of equal blocks as one tree per block, instead of stacked along axis 0."""

    blocks: tuple[Any, ...]


def stack_blocks(params: Any) -> Any:
    """Parameters, or a gradient by them, with every ``Unstacked`` stacked along axis 0 again."""

    def stack(tree):
        if not isinstance(tree, Unstacked):
            return tree
        return jax.tree.map(lambda *rows: jnp.stack(rows), *tree.blocks)

    return jax.tree.map(stack, params, is_leaf=lambda tree: isinstance(tree, Unstacked))


def stochastic_depth(model: Transformer, train: bool) -> Drop:
    """(keys [depth], rates [depth]) of ``drop_path``, the rates growing from 0; None: no drops.

    Needs an rng 'drop_path'. The keys of all blocks are drawn here, so they do not depend on how
    the blocks are run.
    """
    if not (train and model.drop_path and model.has_rng("drop_path")):
        return None
    keys = jax.random.split(model.make_rng("drop_path"), model.depth)
    return keys, jnp.linspace(0.0, model.drop_path, model.depth)


def attention_branch(
    norm: nn.Module, attention: nn.Module, x: jax.Array, keep: jax.Array | None
) -> jax.Array:
    """attention(norm(x)), the residual branch whose gradient ARD drops.

    norm, attention: bound submodules of the calling block, which owns their parameters.
    keep: scalar bool, False stops the gradient through the branch; None: no gate.
    """
    if keep is None:
        return attention(norm(x))
    norm, norm_variables = norm.unbind()
    attention, attention_variables = attention.unbind()

    def branch(variables, x):
        return attention.apply(variables[1], norm.apply(variables[0], x))

    return gate_gradient(branch, (norm_variables, attention_variables), x, keep)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    attention: called as ``attention(name=...)``, returns the attention module. The block returns
      only the tokens whose attention that module computes: all, or the first ones.
    """

    attention: Callable[..., nn.Module]
    mlp_ratio: float
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array | None, drop: Drop) -> tuple[jax.Array, None]:
        """x [b, n, d]; keep: scalar bool (ARD); drop: (key, rate) of stochastic depth, or None."""
        norm1 = LayerNorm(self.norm_eps, self.dtype, name="norm1")
        a = attention_branch(norm1, self.attention(name="attn"), x, keep)
        if drop is not None:
            a = drop_path(drop[0], a, drop[1])
        x = x[:, : a.shape[1]] + a
        hidden_dim = int(x.shape[-1] * self.mlp_ratio)
        y = LayerNorm(self.norm_eps, self.dtype, name="norm2")(x)
        return x + Mlp(hidden_dim, self.dtype, name="mlp")(y), None


def rows(switches: Switches, which: slice | int) -> Switches:
    """The switches of some of the blocks."""
    return jax.tree.map(lambda of_all: of_all[which], switches)


def run_blocks(
    model: Transformer,
    name: str,
    count: int,
    block: Callable[..., nn.Module],
    x: jax.Array,
    switches: Switches,
) -> jax.Array:
    """x after ``count`` equal blocks in a row, the children ``name`` of ``model``.

    Where their parameters are stacked along axis 0, the blocks are scanned: the program holds one
    block, so compile time does not grow with depth. Where they are ``Unstacked``, the program holds
    every block: longer to compile, but nothing is copied from and to stacks.

    block: a functools.partial of a module's class, called as (x, *its switches) -> (x, None).
    With ``model.remat``, a gradient keeps only the input of each block, and computes it once more.
    """
    params = None if model.is_initializing() else model.get_variable("params", name)
    if isinstance(params, Unstacked):

        @jax.jit  # so that the block is traced once, not ``count`` times
        def run(params, x, switches):
            return block(parent=None).apply({"params": params}, x, *switches)[0]

        run = jax.checkpoint(run) if model.remat else run
        for i, of_block in enumerate(params.blocks):
            x = run(of_block, x, rows(switches, i))
            if model.attention_kernel == "cudnn":  # reads rows; XLA would turn all else round
                x = layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
        return x
    kind = nn.remat(block.func, prevent_cse=False) if model.remat else block.func
    axes, split = {"params": 0, "intermediates": 0}, {"params": True}
    scanned = nn.scan(kind, variable_axes=axes, split_rngs=split, in_axes=0, length=count)
    return scanned(*block.args, name=name)(x, *switches)[0]


def last_blocks(
    model: Transformer,
    attention: Callable[..., nn.Module],
    x: jax.Array,
    count: int,
    switches: Switches,
    read: int = 1,
) -> jax.Array:
    """x [b, n, d] -> the first tokens [b, read, d] after ``count`` blocks and the final norm; for
    ``read`` 1, the class token [b, d].

    The head reads only these tokens, so the last block, ``last_block``, computes no other, and no
    keys and values: this saves nearly all of its work. The others are the stack ``blocks``.
    """
    fields = (model.mlp_ratio, model.norm_eps, model.dtype)
    if count > 1:
        n, of_all = x.shape[1], functools.partial(attention, kernel=model.attention_kernel)
        if model.attention_kernel == "cudnn":  # takes an even number of tokens in training
            x = jnp.pad(x, ((0, 0), (0, n % 2), (0, 0)))
            of_all = functools.partial(of_all, tokens=n)
        block = functools.partial(Block, of_all, *fields)
        x = run_blocks(model, "blocks", count - 1, block, x, rows(switches, slice(count - 1)))
        x = x[:, :n]
    of_first = functools.partial(attention, queries=read)
    x, _ = Block(of_first, *fields, name="last_block")(x, *rows(switches, count - 1))
    weights = layers.param_dtype(model.dtype)
    return LayerNorm(model.norm_eps, weights, name="norm")(x[:, 0] if read == 1 else x)


def multiply_adds(
    blocks: Sequence[tuple[int, int, int, int]], d: int, mlp_ratio: float
) -> tuple[float, float]:
    """(in all linear layers, in all products of two activations) of the blocks, for one image.

    blocks: (number of such blocks, tokens, queries, width of a token's attention: d, or heads x d
      where ``attention`` computes no keys and values) of each kind.
    """
    linear = sum(n * q * d * d * (4 + 2 * mlp_ratio) for n, _, q, _ in blocks)
    return linear, sum(n * 2.0 * q * t * width for n, t, q, width in blocks)
