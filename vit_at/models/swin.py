"""Swin: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"
(arXiv 2103.14030), in the shapes of timm.

Attention runs within windows; every second block shifts them by half a window, and between two
stages 2x2 tokens merge into one of twice the width. A stage's blocks are one scanned module over
pairs (unshifted, shifted).

Where a stage's grid is no larger than a window there is one window, as large as the grid, and no
shift. Where a window does not divide the grid, zeros are appended below and to the right of the
shifted tokens, as timm 1.x does; without such padding only multiples of 224 pixels (patch 4) would
do. The shifted tokens are grouped in the same way.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_at.errors import UserError
from vit_at.models import blocks, layers, ops

_SWIN = {"mlp_ratio": 4.0, "norm_eps": 1e-5, "patch_size": 4, "window_size": 7, "drop_path": 0.1}
_BASE = dict(_SWIN, embed_dim=128, depth=24, num_heads=4)
_LARGE = dict(_SWIN, embed_dim=192, depth=24, num_heads=6)

# Width and heads are those of the first stage; both double at every merging.
SIZES = {
    "swin_tiny_patch4_window7_224": dict(_SWIN, embed_dim=96, depth=12, num_heads=3),
    "swin_small_patch4_window7_224": dict(_SWIN, embed_dim=96, depth=24, num_heads=3),
    "swin_base_patch4_window7_224": _BASE,
    "swin_base_patch4_window7_224_in22k": _BASE,
    "swin_large_patch4_window7_224": _LARGE,
    "swin_large_patch4_window7_224_in22k": _LARGE,
}
STAGES = 4
_MASKED = -100.0  # added to the logits of pairs that were not neighbours before the shift


def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table [(2 window - 1)²] for each [query, key] of a window, row-major."""
    row, column = np.divmod(np.arange(window**2), window)
    dy, dx = (c[:, None] - c[None, :] + window - 1 for c in (row, column))
    return dy * (2 * window - 1) + dx


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """What is added to the logits [windows, query, key] of a grid of side x side shifted tokens.

    After the shift, the last window of a row or column holds tokens from both ends of the grid.
    """
    region = np.zeros(side, int)
    region[side - window :] = 1
    region[side - shift :] = 2
    regions = 3 * region[:, None] + region[None, :]
    w = side // window
    regions = regions.reshape(w, window, w, window).transpose(0, 2, 1, 3).reshape(w * w, -1)
    apart = regions[:, :, None] != regions[:, None, :]
    return np.where(apart, _MASKED, 0.0)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias per relative position."""

    num_heads: int
    window: int
    shift: int
    qk_scale: float  # of the attention logits; 0: head_dim ** -0.5
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d]; the n tokens are a square grid in row-major order."""
        b, n, d = x.shape
        side, window = round(n**0.5), self.window
        padding = -side % window
        w = (side + padding) // window  # windows in a row
        x = x.reshape(b, side, side, d)
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
        x = jnp.pad(x, ((0, 0), (0, padding), (0, padding), (0, 0)))
        x = x.reshape(b, w, window, w, window, d).swapaxes(2, 3).reshape(b, w * w, -1, d)

        x = self._attend(x, side + padding)

        x = x.reshape(b, w, w, window, window, d).swapaxes(2, 3).reshape(b, w * window, -1, d)
        x = x[:, :side, :side]
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
        return layers.dense(d, self.dtype, name="proj")(x.reshape(b, n, d))

    def _attend(self, x: jax.Array, padded_side: int) -> jax.Array:
        """Attention within each of the windows of x [b, windows, tokens, d]."""
        b, w, n, d = x.shape
        heads, weights = self.num_heads, layers.param_dtype(self.dtype)
        qkv = layers.dense(3 * d, self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, w, n, 3, heads, d // heads), 3, 0)
        init, shape = layers.EMBEDDING_INIT, ((2 * self.window - 1) ** 2, heads)
        table = self.param("relative_position_bias_table", init, shape, weights)
        bias = jnp.moveaxis(table[relative_position_index(self.window)], -1, 0)  # [heads, n, n]
        if self.shift:
            mask = shift_mask(padded_side, self.window, self.shift)
            bias = bias + jnp.asarray(mask, weights)[:, None]
        scale = self.qk_scale or (d // heads) ** -0.5
        logits = jnp.einsum("bwqhc,bwkhc->bwhqk", q, k, preferred_element_type=weights)
        attention = ops.softmax(logits * scale + bias, self.dtype)
        return jnp.einsum("bwhqk,bwkhc->bwqhc", attention, v).reshape(b, w, n, d)


class Pair(nn.Module):
    """A block with unshifted windows and one with shifted windows."""

    num_heads: int
    window: int
    shift: int
    qk_scale: float
    mlp_ratio: float
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None, drop: blocks.Drop
    ) -> tuple[jax.Array, None]:
        """x [b, n, d]; keep, drop: those of a ``blocks.Block``, a row for each of the two."""
        for i, (name, shift) in enumerate((("even", 0), ("odd", self.shift))):
            fields = (self.num_heads, self.window, shift, self.qk_scale, self.dtype)
            attention = functools.partial(WindowAttention, *fields)
            block = blocks.Block(attention, self.mlp_ratio, self.norm_eps, self.dtype, name=name)
            x, _ = block(x, *blocks.rows((keep, drop), i))
        return x, None


class Merging(nn.Module):
    """2x2 neighbouring tokens of a square grid -> one token of twice the width."""

    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n / 4, 2 d]."""
        b, n, d = x.shape
        half = round(n**0.5) // 2
        x = x.reshape(b, half, 2, half, 2, d).transpose(0, 1, 3, 4, 2, 5).reshape(b, -1, 4 * d)
        x = layers.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        return layers.dense(2 * d, self.dtype, use_bias=False, name="reduction")(x)


class SwinTransformer(blocks.Transformer):
    """Patches, four stages of windowed attention, the mean over all tokens, and a head.

    ``embed_dim`` and ``num_heads`` are those of the first stage. ``depth`` counts the blocks of all
    stages: the third has ``depth`` - 6, every other stage 2.
    """

    window_size: int  # in tokens
    any_size = False  # windows and biases are of one size

    def __post_init__(self):
        if self.depth < 2 * STAGES or self.depth % 2:
            raise UserError(
                f"model.depth {self.depth} does not suit Swin, whose four stages are pairs of "
                f"blocks; choose an even number from {2 * STAGES}"
            )
        step = self.patch_size * 2 ** (STAGES - 1)
        if self.image_size % step:
            below = max(self.image_size // step, 1) * step
            raise UserError(
                f"data.image_size {self.image_size} does not suit Swin with model.patch_size "
                f"{self.patch_size}, whose tokens are merged two by two {STAGES - 1} times; choose "
                f"a multiple of {step}, such as {below} or {below + step}"
            )
        super().__post_init__()

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return (2, 2, self.depth - 6, 2)

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """timm's name of each row of the parameters that are stacked along axis 0."""
        return {
            f"layers_{i}/{name}": tuple(f"layers.{i}.blocks.{j}" for j in range(start, depth, 2))
            for i, depth in enumerate(self.depths)
            for start, name in enumerate(("even", "odd"))
        }

    def stages(self) -> list[tuple[int, int, int, int]]:
        """Per stage: blocks, side of its grid, side of a window, shift of the odd blocks."""
        sides = [self.image_size // self.patch_size // 2**i for i in range(STAGES)]
        windows = [min(side, self.window_size) for side in sides]
        shifts = [w // 2 if s > w else 0 for s, w in zip(sides, windows, strict=True)]
        return list(zip(self.depths, sides, windows, shifts, strict=True))

    def _features(self, x: jax.Array, switches: blocks.Switches) -> jax.Array:
        x = layers.LayerNorm(self.norm_eps, self.dtype, name="patch_norm")(x)
        in_pairs = jax.tree.map(lambda a: a.reshape(-1, 2, *a.shape[1:]), switches)
        fields = (self.qk_scale, self.mlp_ratio, self.norm_eps, self.dtype)
        first = 0
        for i, (depth, _, window, shift) in enumerate(self.stages()):
            if i:
                x = Merging(self.norm_eps, self.dtype, name=f"layers_{i - 1}_downsample")(x)
            pair = functools.partial(Pair, self.num_heads * 2**i, window, shift, *fields)
            count = depth // 2
            of_stage = blocks.rows(in_pairs, slice(first, first + count))
            x = blocks.run_blocks(self, f"layers_{i}", count, pair, x, of_stage)
            first += count
        weights = layers.param_dtype(self.dtype)
        return layers.LayerNorm(self.norm_eps, weights, name="norm")(x).mean(axis=1)

    def multiply_adds(self) -> tuple[float, float]:
        d, attention = self.embed_dim, 0.0
        linear = self.stem_multiply_adds()
        for i, (depth, side, window, _) in enumerate(self.stages()):
            if i:
                linear += side**2 * 4 * d * 2 * d
                d *= 2
            padded = (side + -side % window) ** 2
            linear += depth * d * d * (padded * 3 + side**2 * (1 + 2 * self.mlp_ratio))
            attention += depth * padded * 2 * window**2 * d
        return linear + d * self.num_classes, attention
