"""Arrays that a PyTorch reference computed, and the rules that give its weights and inputs.

``data/models/<tag>.npz`` holds logits, loss and input gradients of one model, computed in float64
with torch 2.13 and timm 0.5.4; ``data/models/models.json`` its facts. The weights are not stored:
``weight`` draws each from its name. Tags: 'cifar_<name>' is at 32 pixels with patch 4,
'imagenet_<name>' at 224 with the patch in the name; all have 10 classes.
"""

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import vit_at.weights
from vit_at import models

DATA = pathlib.Path(__file__).parent / "data" / "models"
FACTS = json.loads((DATA / "models.json").read_text())
LABELS = np.array([3, 7])
STATS = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def weight(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """The parameter of timm's ``name`` in PyTorch's ``shape``, float32."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + salt)
    z = rng.standard_normal(tuple(shape))
    fan_in_scale = 1 / np.sqrt(np.prod(shape[1:]))
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        value = 1 + 0.1 * z
    elif name.endswith("running_var"):
        value = np.exp(z)
    elif name.endswith("gating_param"):
        value = 1 + 0.5 * z
    elif name.endswith((".bias", "cls_token", "pos_embed")):
        value = 0.02 * z
    elif name.endswith("relative_position_bias_table"):
        value = z
    elif name.endswith("pos_proj.weight"):
        value = z * [0.5, 0.5, 0.1]
    elif name.endswith("patch_embed.proj.weight"):
        value = 0.1 * fan_in_scale * z
    elif name.endswith((".qkv.weight", ".qk.weight")):
        value = 1.5 * fan_in_scale * z
    else:
        value = fan_in_scale * z
    return value.astype(np.float32)


def weights(shapes: dict[str, tuple[int, ...]], salt: int = 0) -> dict[str, np.ndarray]:
    """A whole state_dict."""
    return {name: weight(name, shape, salt) for name, shape in shapes.items()}


def images(size: int, normalisation: str) -> np.ndarray:
    """Two normalised images [2, size, size, 3], float64."""
    pixels = np.random.default_rng(1234).uniform(0, 1, (2, size, size, 3)).astype(np.float32)
    mean, std = (np.array(a) for a in STATS[normalisation])
    return (pixels.astype(np.float64) - mean) / std


@functools.cache
def arrays(tag: str) -> dict[str, np.ndarray]:
    """The golden arrays: logits, loss, g, keep, gm (see the tests)."""
    with np.load(DATA / f"{tag}.npz") as file:
        return dict(file)


def create(tag: str, dtype: str = "float32", **overrides):
    """Our model of a tag."""
    name, size = tag.split("_", 1)[1], FACTS["models"][tag]["image_size"]
    name = name.replace("vit_small_patch16_224", "vit_small_patch16_224_timm05")
    if name.endswith("_qkscale768"):  # ViT-small with pretrained weights
        name, overrides["qk_scale"] = name.removesuffix("_qkscale768"), 768**-0.5
    if size == 32:
        overrides["patch_size"] = 4
    return models.create(name, num_classes=10, image_size=size, dtype=dtype, **overrides)


def params(model, salt: int = 0):
    """The weights of the rule for any model."""
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    names = vit_at.weights.timm_shapes(shapes, model)
    return vit_at.weights.from_timm(weights(names, salt), model)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, images):
    return model.apply({"params": params}, images)


def loss_and_logits(model, images, params, keep):
    logits = model.apply({"params": params}, images, keep)
    log_p = jax.nn.log_softmax(logits)
    return -log_p[jnp.arange(len(images)), LABELS[: len(images)]].mean(), logits


def error(value, expected):
    """Largest difference, relative to the largest expected number."""
    return np.abs(np.asarray(value) - expected).max() / np.abs(expected).max()
