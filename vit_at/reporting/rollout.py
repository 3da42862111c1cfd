"""Where a model looks: attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928).

With A the attention of a block, averaged over its heads, half of a token comes from where A says
and half, through the residual path, from itself: (A + I) / 2. The product of these over all blocks
tells how much each patch contributes to the class token at the end.

The attention weights are recomputed from the captured output of each block's query-key layer, so
the models know nothing of this module.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vit_at.models.convit import ConViT
from vit_at.models.vit import VisionTransformer

Array = jax.Array
_CAPTURED = ("qkv", "qk", "pos_proj")


def has_rollout(model: Any) -> bool:
    """False where attention is not among all tokens, as in Swin's windows."""
    return isinstance(model, (VisionTransformer, ConViT))


def rollout(model: Any, params: Any, images: Array) -> Array:
    """[b, rows, columns]: the share of each patch in the class token; their sum is at most 1.

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
    return total[:, 0, 1:].reshape(-1, side, side)


def attention_maps(model: Any, params: Any, images: Array) -> list[Array]:
    """[b, heads, n, n] of each block in forward order; each row adds up to 1.

    ConViT's first blocks lack the class token, which is token 0 of all others. The last block's
    map is [b, heads, 1, n]: of the class token, the only one it computes.
    """
    _, state = model.apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, _: module.name in _CAPTURED,
        mutable=["intermediates"],
    )
    stacks = state["intermediates"]
    maps = []
    for stack in ("local_blocks", "blocks", "last_block"):  # in forward order, as far as there are
        if stack not in stacks:
            continue
        captured = {n: out["__call__"][0] for n, out in stacks[stack]["attn"].items()}
        if stack == "last_block":  # not stacked
            captured = jax.tree.map(lambda x: x[None], captured)
        gates = params[stack]["attn"].get("gating_param")
        for block in range(len(jax.tree.leaves(captured)[0])):
            of_block = jax.tree.map(lambda x, i=block: x[i], captured)
            maps.append(_attention(model, of_block, None if gates is None else gates[block]))
    return maps


def _attention(model: Any, captured: dict[str, Any], gate: Array | None) -> Array:
    """softmax(scale q k) of one block; with a gate, mixed with its positional attention."""
    head_dim = model.embed_dim // model.num_heads
    q, k = captured["qkv"][:2] if "qkv" in captured else jnp.split(captured["qk"], 2, -1)
    q, k = (x.astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim) for x in (q, k))
    scale = model.qk_scale or head_dim**-0.5
    content = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale)
    if gate is None:
        return content
    gate = jax.nn.sigmoid(gate)[:, None, None]
    position = jax.nn.softmax(jnp.moveaxis(captured["pos_proj"], -1, 0))
    return (1 - gate) * content + gate * position
