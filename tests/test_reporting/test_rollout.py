"""Attention maps against the models' own attention; rollout on hand-made attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vit_at import models
from vit_at.reporting import rollout

SIZES = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def random_params(model):
    """Parameters far from their symmetric start."""
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        runs.slow("deit_tiny_distilled_patch16_224"),
        runs.slow("convit_tiny"),
    ],
)
def test_the_maps_are_the_attention_that_the_model_applies(name):
    model = models.create(name, num_classes=3, **SIZES)
    params = random_params(model)
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    maps = jax.jit(functools.partial(rollout.attention_maps, model))(params, images)
    read = 2 if "distilled" in name else 1
    first, last = (16 if "convit" in name else 16 + read), 16 + read
    assert [attention.shape for attention in maps] == [(4, 2, first, first), (4, 2, read, last)]
    assert rollout.rollout(model, params, images).shape == (4, 4, 4)
    # What each attention module gives out, from the maps and the values of its tokens.
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    run = jax.jit(functools.partial(model.apply, **capture))
    _, state = jax.device_get(run({"params": params}, images))
    stacks = ["blocks" if "blocks" in params else "local_blocks", "last_block"]
    for stack, attention in zip(stacks, maps, strict=True):
        captured, own = state["intermediates"][stack], params[stack]["attn"]
        tokens, outputs = (captured[name]["__call__"][0] for name in ("norm1", "attn"))
        if stack != "last_block":  # a stack of one
            tokens, outputs, own = jax.tree.map(lambda x: x[0], (tokens, outputs, own))
        b, n, d = tokens.shape
        to_values, proj = own["v" if "v" in own else "qkv"], own["proj"]
        values = tokens @ to_values["kernel"][:, -d:] + to_values.get("bias", np.zeros(d))[-d:]
        mixed = np.einsum("bhqk,bkhc->bqhc", attention, values.reshape(b, n, 2, d // 2))
        expected = mixed.reshape(b, -1, d) @ proj["kernel"] + proj["bias"]
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_rollout_multiplies_the_blocks_and_keeps_half_for_the_residual(monkeypatch):
    model = models.create("deit_tiny_patch16_224", num_classes=3, image_size=4, patch_size=2)
    to_first_patch = jnp.zeros((1, 2, 5, 5)).at[..., 1].set(1)
    uniform = jnp.full((1, 2, 5, 5), 0.2)
    maps = [to_first_patch, uniform]
    monkeypatch.setattr(rollout, "attention_maps", lambda *_: maps)
    found = rollout.rollout(model, None, None)
    # Class token after block 1: half itself, half patch 1; after block 2: 0.6 of that, and 0.1 of
    # each patch, which is 0.5 itself and 0.5 patch 1 (patch 1: all itself).
    expected = [[0.6 * 0.5 + 0.1 + 3 * 0.05, 0.05], [0.05, 0.05]]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_a_class_token_that_joins_late_has_no_attention_before(monkeypatch):
    model = models.create("convit_tiny", num_classes=3, image_size=4, patch_size=2)
    swap = jnp.eye(4)[jnp.array([1, 0, 2, 3])][None, None]
    last = jnp.zeros((1, 1, 5, 5)).at[..., 1].set(1)
    monkeypatch.setattr(rollout, "attention_maps", lambda *_: [swap, last])
    found = rollout.rollout(model, None, None)
    np.testing.assert_allclose(found[0], [[0.25, 0.25], [0, 0]], atol=1e-7)


def test_windows_have_no_rollout():
    swin = models.create("swin_tiny_patch4_window7_224", num_classes=3)
    assert not rollout.has_rollout(swin)
    assert rollout.has_rollout(models.create("deit_tiny_patch16_224", num_classes=3))
