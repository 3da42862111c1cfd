"""Where a model looks: attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928).

A block with attention A, averaged over heads, passes on (A + I) / 2: half through attention, half
through the residual path. The product over all blocks is each patch's contribution to the class
token.

The attention weights are those that each block sows.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vit_at.models.convit import ConViT
from vit_at.models.vit import VisionTransformer

Array = jax.Array


def has_rollout(model: Any) -> bool:
    """Whether attention is among all tokens; False for Swin's windows."""
    return isinstance(model, (VisionTransformer, ConViT))


def rollout(model: Any, params: Any, images: Array) -> Array:
    """[b, rows, columns]: each patch's share of the class token; they add up to at most 1.

    images: [b, H, W, C], normalised.
    """
    total = None
    for attention in attention_maps(model, params, images):
        queries, n = attention.shape[2:]
        mixing = (attention.mean(1) + jnp.eye(queries, n)) / 2
        if total is not None and total.shape[-1] < n:  # ConViT: the class token joins here
            total = jnp.pad(total, ((0, 0), (1, 0), (1, 0))).at[:, 0, 0].set(1)
        total = mixing if total is None else mixing @ total
    side = model.image_size // model.patch_size
    return total[:, 0, -(side**2) :].reshape(-1, side, side)


def attention_maps(model: Any, params: Any, images: Array) -> list[Array]:
    """[b, heads, n, n] for each block in forward order; each row adds up to 1.

    Token 0 is the class token, which ConViT's first blocks lack. The last block computes only the
    tokens that the head reads: its map is [b, heads, 1, n], or 2 queries for a distilled DeiT.
    """
    _, state = model.apply({"params": params}, images, mutable=["intermediates"])
    stacks, maps = state["intermediates"], []
    for stack in ("local_blocks", "blocks", "last_block"):
        if stack in stacks:
            (weights,) = stacks[stack]["attn"]["weights"]
            maps.extend([weights] if stack == "last_block" else weights)
    return maps
