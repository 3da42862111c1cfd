"""ViT and DeiT: Dosovitskiy et al. 2021, Touvron et al. 2021, in the shapes of timm.

All blocks but the last are one scanned module, their parameters stacked along a leading axis
[depth - 1, ...]. The last block computes only the tokens that the head reads.
"""

import functools

import jax
import jax.numpy as jnp

from vit_at.models import blocks, layers
from vit_at.models.attention import Attention

_TRUNKS = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
_VARIANTS = {  # patch and image of timm's models
    "tiny": ("16_224", "16_384"),
    "small": ("16_224", "16_384", "32_224", "32_384"),
    "base": ("8_224", "16_224", "16_384", "32_224", "32_384", "16_224_in21k"),
    "large": ("16_224", "16_384", "32_384"),
}


def _shape(trunk: str, variant: str) -> dict:
    (width, depth, heads), (patch, image) = _TRUNKS[trunk], variant.split("_")[:2]
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "image_size": int(image)}
    return sizes | {"patch_size": int(patch), "mlp_ratio": 4.0, "qkv_bias": True, "norm_eps": 1e-6}


# The `_in21k` ViT-B is plain ViT-B here: its extra representation layer exists only with the
# pretraining's own classes. The paper's ViT-small is timm 0.5's, of depth 8 and width 768.
SIZES = {f"vit_{t}_patch{v}": _shape(t, v) for t, each in _VARIANTS.items() for v in each} | {
    f"deit_{t}_patch16_{image}": _shape(t, f"16_{image}")
    for t, image in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
}
_TIMM05 = {"depth": 8, "num_heads": 8, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5}
SIZES["vit_small_patch16_224_timm05"] = SIZES["vit_base_patch16_224"] | _TIMM05
DISTILLED_SIZES = {
    name.replace("_patch", "_distilled_patch"): shape
    for name, shape in SIZES.items()
    if name.startswith("deit_")
}


class VisionTransformer(blocks.Transformer):
    """Patches, class token, learnt positions, ``depth`` blocks, and a head on the class token."""

    qkv_bias: bool
    TOKENS = ("cls_token",)  # learnt, put before the patches, and read by the head

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """timm's name of each row of the parameters that are stacked along axis 0.

        ``last_block``, the last in forward order, is not stacked.
        """
        return {"blocks": tuple(f"blocks.{i}" for i in range(self.depth - 1))}

    def _features(self, x: jax.Array, switches: blocks.Switches) -> jax.Array:
        (b, _, d), init, count = x.shape, layers.EMBEDDING_INIT, len(self.TOKENS)
        weights = layers.param_dtype(self.dtype)
        first = [self.param(name, init, (1, 1, d), weights) for name in self.TOKENS]
        pos_embed = self.param("pos_embed", init, (1, count + self.num_tokens, d), weights)
        tokens = [jnp.broadcast_to(token, (b, 1, d)).astype(x.dtype) for token in first]
        positions = layers.resize_positions(pos_embed, count, x.shape[1]).astype(x.dtype)
        x = jnp.concatenate([*tokens, x], axis=1) + positions

        fields = (self.num_heads, self.qkv_bias, self.qk_scale, self.dtype)
        attention = functools.partial(Attention, *fields)
        return blocks.last_blocks(self, attention, x, self.depth, switches, read=count)

    def multiply_adds(self) -> tuple[float, float]:
        read = len(self.TOKENS)
        n, d = read + self.num_tokens, self.embed_dim
        kinds = [(self.depth - 1, n, n, d), (1, n, read, self.num_heads * d)]
        linear, attention = blocks.multiply_adds(kinds, d, self.mlp_ratio)
        return linear + self.stem_multiply_adds() + read * d * self.num_classes, attention


class DistilledTransformer(VisionTransformer):
    """DeiT with a distillation token, whose head's logits are averaged with the class token's.

    Touvron et al. 2021, section 4. Both in training and in evaluation, as an attack needs one
    function of the image.
    """

    TOKENS = ("cls_token", "dist_token")

    def _logits(self, x: jax.Array) -> jax.Array:
        return (self._head("head", x[:, 0]) + self._head("head_dist", x[:, 1])) / 2
