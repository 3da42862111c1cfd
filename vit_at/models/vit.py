"""ViT and DeiT: Dosovitskiy et al. 2021, Touvron et al. 2021, in the shapes of timm 0.5.

All blocks but the last are one scanned module, their parameters stacked along a leading axis
[depth - 1, ...]. The last block computes only the class token, which is all that the head reads.
"""

import functools

import jax
import jax.numpy as jnp

from vit_at.models import blocks, layers
from vit_at.models.attention import Attention

_DEIT = {"mlp_ratio": 4.0, "qkv_bias": True, "norm_eps": 1e-6, "patch_size": 16}
_VIT_BASE = dict(embed_dim=768, depth=12, num_heads=12, **_DEIT)

# The `_in21k` ViT-B is plain ViT-B here: its extra representation layer exists only with the
# pretraining's own classes. ViT-small is timm 0.5's, of depth 8 and width 768.
SIZES = {
    "vit_small_patch16_224": dict(
        _DEIT, embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False, norm_eps=1e-5
    ),
    "vit_base_patch16_224": _VIT_BASE,
    "vit_base_patch16_224_in21k": _VIT_BASE,
    "vit_large_patch16_224": dict(_DEIT, embed_dim=1024, depth=24, num_heads=16),
    "deit_tiny_patch16_224": dict(_DEIT, embed_dim=192, depth=12, num_heads=3),
    "deit_small_patch16_224": dict(_DEIT, embed_dim=384, depth=12, num_heads=6),
    "deit_base_patch16_224": _VIT_BASE,
}


class VisionTransformer(blocks.Transformer):
    """Patches, class token, learnt positions, ``depth`` blocks, and a head on the class token."""

    qkv_bias: bool

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """timm's name of each row of the parameters that are stacked along axis 0.

        ``last_block``, the last in forward order, is not stacked.
        """
        return {"blocks": tuple(f"blocks.{i}" for i in range(self.depth - 1))}

    def _features(self, x: jax.Array, switches: blocks.Switches) -> jax.Array:
        (b, _, d), init = x.shape, layers.EMBEDDING_INIT
        weights = layers.param_dtype(self.dtype)
        cls_token = self.param("cls_token", init, (1, 1, d), weights)
        pos_embed = self.param("pos_embed", init, (1, 1 + self.num_tokens, d), weights)
        cls_token = jnp.broadcast_to(cls_token, (b, 1, d))
        x = jnp.concatenate([cls_token.astype(x.dtype), x], axis=1) + pos_embed.astype(x.dtype)

        fields = (self.num_heads, self.qkv_bias, self.qk_scale, self.dtype)
        attention = functools.partial(Attention, *fields)
        return blocks.last_blocks(self, attention, x, self.depth, switches)

    def multiply_adds(self) -> tuple[float, float]:
        n, d = 1 + self.num_tokens, self.embed_dim
        kinds = [(self.depth - 1, n, n), (1, n, 1)]
        linear, attention = blocks.multiply_adds(kinds, d, self.mlp_ratio)
        return linear + self.stem_multiply_adds() + d * self.num_classes, attention
