"""ConvNeXt: Liu et al. 2022, "A ConvNet for the 2020s" (arXiv 2201.03545), in the shapes of timm;
with the stem 'conv', the robust models of Singh et al. 2023 (arXiv 2303.01870).

There is no attention, so ARD has nothing to mask. PRM masks squares of pixels as everywhere, by
default as large as the stem's patch.
"""

import functools

import flax.linen as nn
import jax

from vit_at.errors import UserError
from vit_at.models import blocks, layers, ops

_CONVNEXT = {"mlp_ratio": 4.0, "norm_eps": 1e-6, "patch_size": 4, "num_heads": 1}

# Widths are those of the first stage; they double from stage to stage.
SIZES = {
    "convnext_tiny": dict(_CONVNEXT, embed_dim=96, depth=18),
    "convnext_small": dict(_CONVNEXT, embed_dim=96, depth=36),
    "convnext_base": dict(_CONVNEXT, embed_dim=128, depth=36),
    "convnext_large": dict(_CONVNEXT, embed_dim=192, depth=36),
}
STAGES = 4
_LAYER_SCALE = 1e-6  # at the start


class PatchStem(nn.Module):
    """One linear map of each patch, and LayerNorm: [b, H, W, C] -> [b, H / patch, W / patch, d]."""

    patch_size: int
    embed_dim: int
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, fields = (self.patch_size,) * 2, layers.conv_fields(self.dtype)
        x = nn.Conv(self.embed_dim, size, size, padding="VALID", name="0", **fields)(images)
        return layers.LayerNorm(self.norm_eps, self.dtype, name="1")(x)


class ConvStem(nn.Module):
    """3x3 convolutions, each with LayerNorm and GELU: [b, H, W, C] -> [b, H / 4, W / 4, d].

    Singh et al.'s, which differs from their ViTs' (``stem.ConvStem``): no 1x1 convolution ends it.
    """

    embed_dim: int
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x, fields = images, layers.conv_fields(self.dtype)
        for i, (width, stride) in enumerate(conv_plan(self.embed_dim)):
            x = nn.Conv(width, (3, 3), stride, padding=1, name=f"stem_{3 * i}", **fields)(x)
            x = layers.LayerNorm(self.norm_eps, self.dtype, name=f"stem_{3 * i + 1}")(x)
            x = ops.gelu(x)
        return x


def conv_plan(d: int) -> list[tuple[int, int]]:
    """(width, stride) of each convolution of the stem 'conv': from ConvNeXt-B on, of three."""
    return [(d // 2, 2), (d, 2)] if d < 128 else [(d // 2, 2), (d // 4 * 3, 2), (d, 1)]


class Block(nn.Module):
    """x + scale * mlp(norm(depthwise 7x7 convolution(x)))."""

    mlp_ratio: float
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, drop: blocks.Drop) -> tuple[jax.Array, None]:
        """x [b, H, W, d]; drop: (key, rate) of stochastic depth, or None."""
        d = x.shape[-1]
        y = layers.DepthwiseConv(7, self.dtype, name="conv_dw")(x)
        y = layers.LayerNorm(self.norm_eps, self.dtype, name="norm")(y)
        y = layers.Mlp(int(d * self.mlp_ratio), self.dtype, name="mlp")(y)
        init, weights = nn.initializers.constant(_LAYER_SCALE), layers.param_dtype(self.dtype)
        y = y * self.param("gamma", init, (d,), weights).astype(y.dtype)
        return x + (y if drop is None else layers.drop_path(drop[0], y, drop[1])), None


class ConvNeXt(blocks.Transformer):
    """A stem, four stages of blocks that halve the grid, the mean over it, and a head.

    ``embed_dim`` is the width of the first stage. ``depth`` counts the blocks of all stages: the
    third has ``depth`` - 9, every other stage 3. drop_path: rate of stochastic depth of the last
    block.
    """

    def __post_init__(self):
        if self.depth < 10:
            raise UserError(
                f"model.depth {self.depth} is too small for ConvNeXt, three of whose four stages "
                "have 3 blocks each; choose at least 10"
            )
        step = self.patch_size * 2 ** (STAGES - 1)
        if self.image_size % step:
            below = max(self.image_size // step, 1) * step
            raise UserError(
                f"data.image_size {self.image_size} does not suit ConvNeXt with model.patch_size "
                f"{self.patch_size}, whose grid is halved {STAGES - 1} times; choose a multiple of "
                f"{step}, such as {below} or {below + step}"
            )
        if self.stem == "conv" and (self.patch_size != 4 or self.embed_dim % 4):
            raise UserError(
                f"model.stem is 'conv', which ConvNeXt has for patches of 4 pixels and widths that "
                f"4 divides, not for model.patch_size {self.patch_size} and model.embed_dim "
                f"{self.embed_dim}; choose such, or stem 'patch'"
            )
        for field, own in (("num_heads", 1), ("qk_scale", 0)):
            if (value := getattr(self, field)) != own:
                raise UserError(f"model.{field} is {value:g}, but ConvNeXt has no attention; use 0")
        super().__post_init__()

    @property
    def num_blocks(self) -> int:
        """No attention blocks."""
        return 0

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return (3, 3, self.depth - 9, 3)

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """timm's name of each row of the parameters that are stacked along axis 0."""
        return {
            f"stages_{i}": tuple(f"stages.{i}.blocks.{j}" for j in range(depth))
            for i, depth in enumerate(self.depths)
        }

    def _embed(self) -> nn.Module:
        fields = (self.embed_dim, self.norm_eps, self.dtype)
        if self.stem == "conv":
            return ConvStem(*fields, name="stem")
        return PatchStem(self.patch_size, *fields, name="stem")

    def _features(self, x: jax.Array, switches: blocks.Switches) -> jax.Array:
        _, drop = switches
        block = functools.partial(Block, self.mlp_ratio, self.norm_eps, self.dtype)
        first = 0
        for i, depth in enumerate(self.depths):
            name = f"stages_{i}_downsample"
            if i:
                x = layers.LayerNorm(self.norm_eps, self.dtype, name=f"{name}_0")(x)
                fields = {"padding": "VALID", **layers.conv_fields(self.dtype)}
                x = nn.Conv(self.embed_dim * 2**i, (2, 2), 2, name=f"{name}_1", **fields)(x)
            of_stage = blocks.rows((drop,), slice(first, first + depth))
            x = blocks.run_blocks(self, f"stages_{i}", depth, block, x, of_stage)
            first += depth
        weights = layers.param_dtype(self.dtype)
        x = x.astype(weights).mean(axis=(1, 2))
        return layers.LayerNorm(self.norm_eps, weights, name="head_norm")(x)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self._head("head_fc", x)

    def multiply_adds(self) -> tuple[float, float]:
        d, side, linear = self.embed_dim, self.image_size // self.patch_size, 0.0
        if self.stem == "conv":
            half, channels = 2 * side, self.in_channels
            for i, (width, _) in enumerate(conv_plan(d)):
                linear += (side if i else half) ** 2 * 9 * channels * width
                channels = width
        else:
            linear += self.image_size**2 * self.in_channels * d
        for i, depth in enumerate(self.depths):
            if i:
                side //= 2
                linear, d = linear + side**2 * 4 * d * 2 * d, 2 * d
            linear += depth * side**2 * d * (49 + 2 * self.mlp_ratio * d)
        return linear + d * self.num_classes, 0.0
