"""The convolutional stem: its arithmetic, its names, and the sizes that have one."""

import math

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at import models, weights
from vit_at.errors import UserError
from vit_at.models import stem

SMALL = {"num_classes": 3, "image_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


def by_hand(state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Convolution, LayerNorm and GELU of stem.0, 1, 3, 4, ... pixel by pixel, in float64."""
    x, i = images.astype(np.float64), 0
    while (kernel := state[f"patch_embed.proj.stem.{i}.weight"]).shape[-1] == 3:
        b, side, _, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = np.zeros((b, side // 2, side // 2, len(kernel)))
        for row, column in np.ndindex(side // 2, side // 2):
            seen = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            out[:, row, column] = np.einsum("byxc,ocyx->bo", seen, kernel.astype(np.float64))
        x = out + state[f"patch_embed.proj.stem.{i}.bias"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        norm = f"patch_embed.proj.stem.{i + 1}"
        x = x * state[f"{norm}.weight"] + state[f"{norm}.bias"]
        x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        i += 3
    x = x @ kernel[:, :, 0, 0].T.astype(np.float64) + state[f"patch_embed.proj.stem.{i}.bias"]
    return x.reshape(len(x), -1, x.shape[-1])


@pytest.mark.parametrize(("patch", "widths"), [(2, [16]), (4, [8, 16]), (16, [2, 4, 8, 16])])
def test_tokens_are_those_of_the_formula(patch, widths):
    model = models.create("deit_tiny_patch16_224", patch_size=patch, stem="conv", **SMALL)
    params = golden.params(model)
    state = weights.to_timm(params, model)
    assert [state[f"patch_embed.proj.stem.{3 * i}.weight"].shape for i in range(len(widths))] == [
        (after, before, 3, 3) for before, after in zip([3, *widths], widths, strict=False)
    ]
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    embed = jax.jit(stem.create("conv", patch, 16, "float32").apply)
    tokens = embed({"params": params["patch_embed"]}, images)
    np.testing.assert_allclose(tokens, by_hand(state, images), atol=2e-5)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "convit_tiny"])
def test_weights_go_both_ways_and_cost_is_counted(name):
    sizes = {"patch_size": 4, **SMALL}
    model = models.create(name, stem="conv", **sizes)
    params = golden.params(model)
    back = weights.from_timm(weights.to_timm(params, model), model)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, back))
    patches = models.create(name, **sizes)
    conv = 64 * 9 * 3 * 8 + 16 * 9 * 8 * 16 + 16 * 16 * 16
    assert model.forward_flops() - patches.forward_flops() == 2 * (conv - 16 * 16 * 3 * 16)


@pytest.mark.slow
def test_ards_gate_and_bfloat16_know_no_difference():
    model = models.create("convit_tiny", stem="conv", patch_size=4, dtype="bfloat16", **SMALL)
    params, images = golden.params(model), jnp.ones((2, 16, 16, 3))

    def gradient(keep):
        loss = lambda x: model.apply({"params": params}, x, jnp.full(2, keep)).sum()  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(images))

    assert jax.eval_shape(model.apply, {"params": params}, images).dtype == jnp.float32
    assert np.isfinite(gradient(False)).all()
    assert not np.allclose(gradient(False), gradient(True))


def test_sizes_without_such_a_stem_are_refused():
    with pytest.raises(UserError, match="a multiple of it"):
        stem.conv_widths(6, 192)
    with pytest.raises(UserError, match="16-pixel patches of width 20"):
        stem.conv_widths(16, 20)
