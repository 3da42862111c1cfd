"""ConViT: d'Ascoli et al. 2021, "ConViT: Improving Vision Transformers with Soft Convolutional
Inductive Biases" (arXiv 2103.10697), in the shapes of timm.

The first blocks use gated positional self-attention (GPSA) among the patches alone; the class
token, which has no position, joins them before the last ones, which are ordinary blocks.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_at.errors import UserError
from vit_at.models import blocks, layers, ops
from vit_at.models.attention import Attention

_CONVIT = {"depth": 12, "mlp_ratio": 4.0, "norm_eps": 1e-6, "patch_size": 16}

SIZES = {
    "convit_tiny": dict(_CONVIT, embed_dim=192, num_heads=4),
    "convit_small": dict(_CONVIT, embed_dim=432, num_heads=9),
    "convit_base": dict(_CONVIT, embed_dim=768, num_heads=16),
}
MAX_LOCAL_BLOCKS = 10  # blocks with GPSA; a shallower model has one ordinary block at its end


def relative_positions(num_tokens: int, dtype: jnp.dtype) -> jax.Array:
    """[query, key, 3]: dx, dy, dx² + dy² in patches, from query to key, on a square grid."""
    side = round(num_tokens**0.5)
    row, column = jnp.divmod(jnp.arange(num_tokens), side)
    dx, dy = (c[None, :] - c[:, None] for c in (column, row))
    return jnp.stack([dx, dy, dx**2 + dy**2], axis=-1).astype(dtype)


def _local_init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Each head of [3, heads] looks at another neighbour, as a convolution's tap (eq. 7 there).

    With k² the largest square number of heads, the heads form a k x k kernel around the query; a
    head beyond them starts without a preferred direction.
    """
    heads = shape[1]
    side = int(heads**0.5)
    dy, dx = jnp.divmod(jnp.arange(side**2), side)
    centre = (side - 1) / 2
    taps = jnp.stack([2 * (dx - centre), 2 * (dy - centre), -jnp.ones(side**2)])
    start = layers.EMBEDDING_INIT(key, shape, dtype)
    return start.at[:, : side**2].set(taps.astype(dtype))


class GatedPositionalAttention(nn.Module):
    """Attention that a learnt gate per head mixes from content and relative position.

    The attention weights [b, h, n, n] are sown as 'weights'.
    """

    num_heads: int
    qk_scale: float  # of the content logits; 0: head_dim ** -0.5
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d]; the n tokens are a square grid in row-major order."""
        b, n, d = x.shape
        heads, weights = self.num_heads, layers.param_dtype(self.dtype)
        linear = functools.partial(layers.dense, dtype=self.dtype, use_bias=False)
        qk = linear(2 * d, name="qk")(x)
        v = linear(d, kernel_init=lambda _, shape, dtype: jnp.eye(*shape, dtype=dtype), name="v")(x)
        v = v.reshape(b, n, heads, -1)
        q, k = jnp.moveaxis(qk.reshape(b, n, 2, heads, d // heads), 2, 0)
        scale = self.qk_scale or (d // heads) ** -0.5
        content = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=weights) * scale

        fields = {"dtype": weights, "param_dtype": weights, "kernel_init": _local_init}
        to_heads = nn.Dense(heads, **fields, name="pos_proj")
        position = jnp.moveaxis(to_heads(relative_positions(n, weights)), -1, 0)  # [h, n, n]
        gate = self.param("gating_param", nn.initializers.ones, (heads,), weights)
        gate = jax.nn.sigmoid(gate)[:, None, None]
        by_content = ops.softmax(content, self.dtype)
        attention = (1 - gate) * by_content + gate * ops.softmax(position, weights)
        self.sow("intermediates", "weights", attention)
        out = jnp.einsum("bhqk,bkhc->bqhc", attention.astype(self.dtype), v)
        return layers.dense(d, self.dtype, name="proj")(out.reshape(b, n, d))


class ConViT(blocks.Transformer):
    """Patches with learnt positions, GPSA blocks, then the class token and ordinary blocks."""

    def __post_init__(self):
        if self.depth < 2:
            raise UserError(
                f"model.depth {self.depth} is too small for ConViT, which needs a block without "
                "the class token and one with it; choose at least 2"
            )
        super().__post_init__()

    @property
    def local_blocks(self) -> int:
        """Number of blocks with gated positional attention, before the class token joins."""
        return min(MAX_LOCAL_BLOCKS, self.depth - 1)

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """timm's name of each row of the parameters that are stacked along axis 0.

        ``last_block``, the last in forward order, is not stacked.
        """
        names = tuple(f"blocks.{i}" for i in range(self.depth))
        return {"local_blocks": names[: self.local_blocks], "blocks": names[self.local_blocks : -1]}

    def _features(self, x: jax.Array, switches: blocks.Switches) -> jax.Array:
        (b, _, d), init, split = x.shape, layers.EMBEDDING_INIT, self.local_blocks
        weights, rest = layers.param_dtype(self.dtype), (self.qk_scale, self.dtype)
        pos_embed = self.param("pos_embed", init, (1, self.num_tokens, d), weights)
        x = x + layers.resize_positions(pos_embed, 0, x.shape[1]).astype(x.dtype)

        gpsa = functools.partial(GatedPositionalAttention, self.num_heads, *rest)
        attention = functools.partial(Attention, self.num_heads, False, *rest)
        fields = (self.mlp_ratio, self.norm_eps, self.dtype)
        local = functools.partial(blocks.Block, gpsa, *fields)
        first, last = (blocks.rows(switches, r) for r in (slice(split), slice(split, None)))
        x = blocks.run_blocks(self, "local_blocks", split, local, x, first)
        cls_token = self.param("cls_token", init, (1, 1, d), weights)
        cls_token = jnp.broadcast_to(cls_token, (b, 1, d))
        x = jnp.concatenate([cls_token.astype(x.dtype), x], axis=1)
        return blocks.last_blocks(self, attention, x, self.depth - split, last)

    def multiply_adds(self) -> tuple[float, float]:
        n, d, local = self.num_tokens, self.embed_dim, self.local_blocks
        kinds = [(local, n, n, d), (self.depth - local - 1, n + 1, n + 1, d)]
        kinds.append((1, n + 1, 1, self.num_heads * d))
        linear, attention = blocks.multiply_adds(kinds, d, self.mlp_ratio)
        position = local * 3 * n * n * self.num_heads
        return linear + self.stem_multiply_adds() + position + d * self.num_classes, attention
