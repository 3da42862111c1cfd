"""Images to tokens: the first layers of every architecture.

PatchEmbed     one linear map of each patch
ConvStem       convolutions of stride 2, which robust training prefers
create         one of the two, by name
multiply_adds  its cost
"""

import flax.linen as nn
import jax
from jax import lax

from vit_at.errors import UserError
from vit_at.models import layers, ops

_NORM_EPS = 1e-6


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
        d, weights = self.embed_dim, layers.param_dtype(self.dtype)
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, (p, p, channels, d), weights)
        bias = self.param("bias", nn.initializers.zeros, (d,), weights)
        # Pixels are moved in dtype, and with the barrier their gradients, too: fewer bytes.
        images = lax.optimization_barrier(images.astype(self.dtype))
        patches = images.reshape(b, height // p, p, width // p, p, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * channels)
        kernel = kernel.reshape(-1, d).astype(self.dtype)
        tokens = ops.linear(lax.optimization_barrier(patches), kernel)
        return tokens + bias.astype(self.dtype)


class ConvStem(nn.Module):
    """Tokens of [b, H, W, C] images by 3x3 convolutions of stride 2, in row-major order.

    A patch of 2^k pixels takes k convolutions, each followed by LayerNorm and GELU; the widths
    double up to d, and a 1x1 convolution ends the stem (Xiao et al. 2021, "Early Convolutions Help
    Transformers See Better"; for robust training Singh et al. 2023, arXiv 2303.01870). Modules are
    named as theirs.
    """

    patch_size: int
    embed_dim: int
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        fields = layers.conv_fields(self.dtype)
        x = images.astype(self.dtype)
        for i, width in enumerate(conv_widths(self.patch_size, self.embed_dim)):
            convolve = nn.Conv(width, (3, 3), 2, padding=1, name=f"stem_{3 * i}", **fields)
            norm = layers.LayerNorm(_NORM_EPS, self.dtype, name=f"stem_{3 * i + 1}")
            x = ops.gelu(norm(convolve(x)))
        x = nn.Conv(self.embed_dim, (1, 1), name=f"stem_{3 * i + 3}", **fields)(x)
        return x.reshape(x.shape[0], -1, self.embed_dim)  # may be symbolic


def conv_widths(patch_size: int, embed_dim: int) -> list[int]:
    """Channels after each convolution of stride 2; UserError for sizes that have no such stem."""
    count = patch_size.bit_length() - 1
    if patch_size != 2**count or count < 1 or embed_dim % 2 ** (count - 1):
        raise UserError(
            f"model.stem is 'conv', which halves images up to the patch and doubles widths up to "
            f"model.embed_dim: {patch_size}-pixel patches of width {embed_dim} don't allow that; "
            "choose a patch of 2, 4, 8 or 16 pixels and a width that is a multiple of it"
        )
    return [embed_dim >> (count - 1 - i) for i in range(count)]


def create(stem: str, patch_size: int, embed_dim: int, dtype: str) -> nn.Module:
    """The module ``patch_embed`` of a transformer; stem: 'patch' or 'conv'."""
    kind = {"patch": PatchEmbed, "conv": ConvStem}[stem]
    return kind(patch_size, embed_dim, dtype, name="patch_embed")


def multiply_adds(
    stem: str, image_size: int, patch_size: int, embed_dim: int, in_channels: int
) -> float:
    """Multiply-adds of the stem, for one image."""
    if stem == "patch":
        return float(image_size**2 * in_channels * embed_dim)
    total, side, channels = 0, image_size, in_channels
    for width in conv_widths(patch_size, embed_dim):
        side //= 2
        total, channels = total + side**2 * 9 * channels * width, width
    return float(total + side**2 * channels * embed_dim)
