"""XCiT: El-Nouby et al. 2021, "XCiT: Cross-Covariance Image Transformers" (arXiv 2106.09681), in
the shapes of timm and of the robust models of Debenedetti et al. 2023 (arXiv 2209.07399).

Attention is between channels instead of tokens, so its cost is linear in the number of tokens.
Tokens meet in depthwise convolutions; two blocks of class attention then read them.

timm normalises by BatchNorm in the stem and in the depthwise convolutions. Here the statistics are
fixed: they are folded into a scale and a bias per channel when weights are read
(``weights.batch_norm``), and training goes on from these. In evaluation this is exactly timm's
model. In training, an image's logits do not depend on the rest of the batch, so results do not
depend on devices or accumulation, and attack and update see one function. From scratch, these
scales and biases start at 1 and 0.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_at.errors import UserError
from vit_at.models import blocks, layers, ops
from vit_at.models.attention import QueryKeyValue, project
from vit_at.models.xcit_stem import Affine, ConvPatchEmbed, PositionalEncoding, conv_plan

_TRUNKS = {  # width, depth, heads
    "nano_12": (128, 12, 4),
    "tiny_12": (192, 12, 4),
    "tiny_24": (192, 24, 4),
    "small_12": (384, 12, 8),
    "small_24": (384, 24, 8),
    "medium_12": (512, 12, 8),
    "medium_24": (512, 24, 8),
    "large_12": (768, 12, 16),
    "large_24": (768, 24, 16),
}


def _shape(trunk: str, patch: int, image: int) -> dict:
    width, depth, heads = _TRUNKS[trunk]
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4.0}
    sizes |= {"image_size": image, "patch_size": patch, "norm_eps": 1e-6}
    scale = 1.0 if depth == 12 else 1e-5
    convolutions = 3 if patch == 8 else 4
    own = {"layer_scale": scale, "tokens_norm": trunk != "nano_12", "convolutions": convolutions}
    return sizes | own


# The medium and large models of depth 12, and those with patch 4, are Debenedetti et al.'s.
SIZES = {
    f"xcit_{trunk}_p{patch}_224": _shape(trunk, patch, 224)
    for patch in (16, 8)
    for trunk in _TRUNKS
    if patch == 16 or trunk not in ("medium_12", "large_12")
} | {f"xcit_{t}_12_p4_32": _shape(f"{t}_12", 4, 32) for t in ("small", "medium", "large")}
CLASS_BLOCKS = 2


class CrossCovarianceAttention(nn.Module):
    """softmax(temperature K^T Q) V with queries and keys of unit norm over tokens (eq. 3 there)."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d]."""
        (b, n, d), h, wide = x.shape, self.num_heads, layers.param_dtype(self.dtype)
        qkv = project(x, *QueryKeyValue(True, self.dtype, name="qkv")(d))
        q, k, v = (part.reshape(b, n, h, d // h) for part in jnp.split(qkv, 3, -1))
        q, k = (y.astype(wide) for y in (q, k))
        q, k = (y * jax.lax.rsqrt(jnp.maximum((y**2).sum(1, keepdims=True), 1e-24)) for y in (q, k))
        temperature = self.param("temperature", nn.initializers.ones, (h, 1, 1), wide)
        attention = ops.softmax(jnp.einsum("bnhc,bnhe->bhce", q, k) * temperature, self.dtype)
        out = jnp.einsum("bhce,bnhe->bnhc", attention, v)
        return layers.dense(d, self.dtype, name="proj")(out.reshape(b, n, d))


class LocalInteraction(nn.Module):
    """Two depthwise 3x3 convolutions over the grid of tokens, with GELU and a scale between."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, n, d] -> [b, n, d]; the n tokens are a square grid in row-major order."""
        (b, n, d), side = x.shape, round(x.shape[1] ** 0.5)
        depthwise = functools.partial(layers.DepthwiseConv, 3, self.dtype)
        x = ops.gelu(depthwise(name="conv1")(x.reshape(b, side, side, d)))
        x = depthwise(name="conv2")(Affine(self.dtype, name="bn")(x))
        return x.reshape(b, n, d)


class ClassAttention(nn.Module):
    """Attention of the class token, token 0, to all tokens: [b, n, d] -> [b, 1, d]."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (b, _, d), h, wide = x.shape, self.num_heads, layers.param_dtype(self.dtype)
        linear = functools.partial(layers.dense, d, self.dtype)
        q = linear(name="q")(x[:, 0]).reshape(b, h, d // h)
        k, v = (linear(name=name)(x).reshape(b, -1, h, d // h) for name in ("k", "v"))
        logits = jnp.einsum("bhc,bnhc->bhn", q, k, preferred_element_type=wide) * (d // h) ** -0.5
        out = jnp.einsum("bhn,bnhc->bhc", ops.softmax(logits, v.dtype), v)
        return linear(name="proj")(out.reshape(b, 1, d))


class _Layer(nn.Module):
    """What both kinds of blocks have in common.

    layer_scale: start of the learnt scale of each branch.
    """

    num_heads: int
    mlp_ratio: float
    norm_eps: float
    layer_scale: float
    dtype: str

    def norm(self, name: str) -> layers.LayerNorm:
        return layers.LayerNorm(self.norm_eps, self.dtype, name=name)

    def mlp(self, d: int) -> layers.Mlp:
        return layers.Mlp(int(d * self.mlp_ratio), self.dtype, name="mlp")

    def scaled(self, branch: jax.Array, name: str) -> jax.Array:
        init, shape = nn.initializers.constant(self.layer_scale), branch.shape[-1:]
        gamma = self.param(name, init, shape, layers.param_dtype(self.dtype))
        return branch * gamma.astype(branch.dtype)


class Block(_Layer):
    """Cross-covariance attention, local interaction and an MLP, each a scaled residual branch."""

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None, drop: blocks.Drop
    ) -> tuple[jax.Array, None]:
        """x [b, n, d]; keep: scalar bool (ARD); drop: (key, rate) of stochastic depth, or None.

        Stochastic depth drops each of the three branches.
        """

        def add(x, branch, i):
            branch = self.scaled(branch, f"gamma{i}")
            if drop is not None:
                branch = layers.drop_path(jax.random.fold_in(drop[0], i), branch, drop[1])
            return x + branch

        attention = CrossCovarianceAttention(self.num_heads, self.dtype, name="attn")
        x = add(x, blocks.attention_branch(self.norm("norm1"), attention, x, keep), 1)
        x = add(x, LocalInteraction(self.dtype, name="local_mp")(self.norm("norm3")(x)), 3)
        return add(x, self.mlp(x.shape[-1])(self.norm("norm2")(x)), 2), None


class ClassBlock(_Layer):
    """Class attention and an MLP for the class token, token 0.

    As in the authors' code, the other tokens are not left alone: the first branch adds their norm
    to them, and the second doubles them.

    tokens_norm: whether the second norm is of all tokens. last: returns the class token alone.
    """

    tokens_norm: bool = True
    last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        """x [b, n, d] -> [b, n, d], or [b, 1, d]; keep: scalar bool (ARD), or None."""
        norm1, norm2 = self.norm("norm1"), self.norm("norm2")
        attention = ClassAttention(self.num_heads, self.dtype, name="attn")
        a = blocks.attention_branch(norm1, attention, x, keep)
        if not self.last:
            a = jnp.concatenate([a, norm1(x)[:, 1:]], axis=1)
        x = x[:, : a.shape[1]] + self.scaled(a, "gamma1")
        x = norm2(x) if self.tokens_norm else jnp.concatenate([norm2(x[:, :1]), x[:, 1:]], axis=1)
        token, others = x[:, :1], x[:, 1:]
        token = token + self.scaled(self.mlp(x.shape[-1])(token), "gamma2")
        return jnp.concatenate([token, 2 * others], axis=1)


class XCiT(blocks.Transformer):
    """A convolutional stem, ``depth`` blocks, two of class attention, and a head.

    ``num_blocks`` counts both kinds. drop_path: rate of stochastic depth in each of the first.
    """

    convolutions: int  # of the stem
    layer_scale: float
    tokens_norm: bool  # see ``ClassBlock``

    def __post_init__(self):
        patches = [2**i for i in range(1, self.convolutions + 1)]
        if self.patch_size not in patches:
            raise UserError(
                f"model.patch_size {self.patch_size} does not suit this XCiT, whose "
                f"{self.convolutions} convolutions may halve the image: choose one of "
                f"{', '.join(map(str, patches))}"
            )
        if self.embed_dim % 2 ** (self.convolutions - 1):
            raise UserError(
                f"model.embed_dim {self.embed_dim} does not suit XCiT, whose stem doubles widths "
                f"up to it; choose a multiple of {2 ** (self.convolutions - 1)}"
            )
        if self.stem != "patch":
            raise UserError(
                f"model.stem is '{self.stem}', but XCiT's own stem is convolutional; use 'patch'"
            )
        if self.qk_scale:
            raise UserError(
                f"model.qk_scale is {self.qk_scale:g}, but XCiT learns a temperature; use 0"
            )
        super().__post_init__()

    @property
    def num_blocks(self) -> int:
        """Number of attention blocks, in forward order: the length of ``attn_grad_keep``."""
        return self.depth + CLASS_BLOCKS

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """timm's name of each row of the parameters that are stacked along axis 0."""
        return {"blocks": tuple(f"blocks.{i}" for i in range(self.depth))}

    @property
    def batch_norms(self) -> tuple[str, ...]:
        """timm's names of the layers that are BatchNorm there and ``Affine`` here."""
        stem = tuple(f"patch_embed.proj.{2 * i}.1" for i in range(self.convolutions))
        return stem + tuple(f"blocks.{i}.local_mp.bn" for i in range(self.depth))

    def _embed(self) -> nn.Module:
        sizes = (self.patch_size, self.convolutions, self.embed_dim)
        return ConvPatchEmbed(*sizes, self.dtype, name="patch_embed")

    def _features(self, x: jax.Array, switches: blocks.Switches) -> jax.Array:
        (b, n, d), weights = x.shape, layers.param_dtype(self.dtype)
        x = x + PositionalEncoding(d, self.dtype, name="pos_embed")(round(n**0.5))
        keep, drop = switches
        if drop is not None:  # the same rate everywhere, as timm's
            drop = drop[0], jnp.full_like(drop[1], self.drop_path)
        fields = (self.num_heads, self.mlp_ratio, self.norm_eps, self.layer_scale, self.dtype)
        block, count = functools.partial(Block, *fields), self.depth
        of_blocks = blocks.rows((keep, drop), slice(count))
        x = blocks.run_blocks(self, "blocks", count, block, x, of_blocks)
        cls_token = self.param("cls_token", layers.EMBEDDING_INIT, (1, 1, d), weights)
        cls_token = jnp.broadcast_to(cls_token, (b, 1, d)).astype(x.dtype)
        x = jnp.concatenate([cls_token, x], axis=1)
        for i in range(CLASS_BLOCKS):
            own = {"tokens_norm": self.tokens_norm, "last": i == CLASS_BLOCKS - 1}
            block = ClassBlock(*fields, **own, name=f"cls_attn_blocks_{i}")
            x = block(x, None if keep is None else keep[count + i])
        return layers.LayerNorm(self.norm_eps, weights, name="norm")(x[:, 0])

    def multiply_adds(self) -> tuple[float, float]:
        n, d, mlp = self.num_tokens, self.embed_dim, 2 * self.mlp_ratio
        linear, side, channels = float(d * self.num_classes), self.image_size, self.in_channels
        for width, stride in conv_plan(self.patch_size, self.convolutions, d):
            side //= stride
            linear, channels = linear + side**2 * 9 * channels * width, width
        linear += self.depth * n * d * ((4 + mlp) * d + 2 * 9)
        linear += CLASS_BLOCKS * d * d * (2 * (n + 1) + 2 + mlp)
        attention = self.depth * 2 * n * d * d / self.num_heads + CLASS_BLOCKS * 2 * (n + 1) * d
        return linear, attention
