"""Images to tokens and their positions, as XCiT has them.

Affine              BatchNorm with fixed statistics
ConvPatchEmbed      convolutions with stride 2 or 1; ``conv_plan`` lists them
PositionalEncoding  a linear map of sines and cosines
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_at.models import layers, ops

FREQUENCIES = 32  # of the positional encoding, for each axis
_TEMPERATURE = 10_000  # of the positional encoding


class Affine(nn.Module):
    """x * scale + bias per channel: BatchNorm with fixed statistics, folded."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, weights = (x.shape[-1],), layers.param_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, shape, weights)
        bias = self.param("bias", nn.initializers.zeros, shape, weights)
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


class ConvPatchEmbed(nn.Module):
    """Tokens of [b, H, W, C] images by 3x3 convolutions, in row-major order.

    The last log2(patch) of them have stride 2. The earlier ones have stride 1, so weights for large
    patches serve small ones without a change, as in Debenedetti et al.'s CIFAR models.
    """

    patch_size: int
    convolutions: int
    embed_dim: int
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        fields = layers.conv_fields(self.dtype)
        convolve = functools.partial(
            nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal()
        )
        x = images.astype(self.dtype)
        plan = conv_plan(self.patch_size, self.convolutions, self.embed_dim)
        for i, (width, stride) in enumerate(plan):
            x = ops.gelu(x) if i else x
            x = convolve(width, (3, 3), stride, padding=1, name=f"{2 * i}_0", **fields)(x)
            x = Affine(self.dtype, name=f"{2 * i}_1")(x)
        return x.reshape(len(x), -1, self.embed_dim)


def conv_plan(patch_size: int, convolutions: int, embed_dim: int) -> list[tuple[int, int]]:
    """(width, stride) of each convolution of the stem."""
    halvings = patch_size.bit_length() - 1
    widths = [embed_dim >> (convolutions - 1 - i) for i in range(convolutions)]
    return [(d, 1 + (i >= convolutions - halvings)) for i, d in enumerate(widths)]


def positions(side: int) -> np.ndarray:
    """Sines and cosines [side², 2 * FREQUENCIES] of row and column, float32, as timm's."""
    along = (
        np.arange(1, side + 1, dtype=np.float32) / np.float32(side + 1e-6) * np.float32(2 * np.pi)
    )
    period = np.float32(_TEMPERATURE) ** (2 * np.arange(FREQUENCIES // 2) / FREQUENCIES)
    angles = along[:, None] / period.astype(np.float32)
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(side, FREQUENCIES)
    row, column = np.divmod(np.arange(side**2), side)
    return np.concatenate([waves[row], waves[column]], axis=-1)


class PositionalEncoding(nn.Module):
    """A learnt linear map of ``positions``: [1, side², d]."""

    embed_dim: int
    dtype: str

    @nn.compact
    def __call__(self, side: int) -> jax.Array:
        fields = layers.conv_fields(self.dtype)
        waves = jnp.asarray(positions(side), self.dtype)[None, None]
        return nn.Conv(self.embed_dim, (1, 1), name="token_projection", **fields)(waves)[0]
