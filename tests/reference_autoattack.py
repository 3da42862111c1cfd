"""What the official PyTorch AutoAttack did on a small robust ViT (tests/data/autoattack)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vit_at import models, weights

DATA = pathlib.Path(__file__).parent / "data" / "autoattack"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 4.0}
THEIR_NAME = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as archive:
        return dict(archive)


@functools.cache
def results() -> dict:
    return json.loads((DATA / "results.json").read_text())


def model(dtype: str = "float32"):
    return models.create(
        "deit_tiny_patch16_224",
        num_classes=10,
        image_size=32,
        patch_size=4,
        embed_dim=96,
        depth=4,
        num_heads=3,
        dtype=dtype,
    )


def parameters(dtype: str = "float32"):
    state = arrays("model_weights")
    return jax.tree.map(lambda x: x.astype(dtype), weights.from_timm(state, model(dtype)))


def apply(dtype: str = "float32"):
    """(params, images [b, 32, 32, 3] in [0, 1]) -> logits."""
    return models.classifier(model(dtype), MEAN, STD)


def images(dtype: str = "float32"):
    """All 256 images [256, 32, 32, 3] in [0, 1] and their labels."""
    data = arrays("images")
    pixels = (data["images"].astype(np.float32) / np.float32(255)).astype(dtype)
    return jnp.asarray(pixels), jnp.asarray(data["labels"], jnp.int32)


def traced(dtype: str = "float64"):
    """The 16 images of the traces, and their labels."""
    chosen = arrays("traces")["sel"]
    pixels, labels = images(dtype)
    return pixels[chosen], labels[chosen]


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)
