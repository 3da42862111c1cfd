"""The recorded training steps of the PyTorch reference (tests/data/steps), as ours would see them.

The arrays there are in normalised space; here they are taken to pixel units with the exact decimals
of mean and std.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vit_at import models, weights
from vit_at.attacks import Threat
from vit_at.training.attack import START_SCALE, Draws

DATA = pathlib.Path(__file__).parent / "data" / "steps"
CASES = tuple(sorted(path.stem.removeprefix("train_") for path in DATA.glob("train_*.npz")))
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
THREAT = Threat("linf", 8 / 255, 2 / 255, 10)


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as archive:
        return dict(archive)


def model(dtype: str):
    return models.create(
        "deit_tiny_patch16_224",
        num_classes=10,
        image_size=32,
        patch_size=4,
        embed_dim=48,
        depth=4,
        num_heads=3,
        dtype=dtype,
    )


def parameters(dtype: str):
    state = {n[6:]: v for n, v in arrays("model").items() if n.startswith("param/")}
    return jax.tree.map(lambda x: x.astype(dtype), weights.from_timm(state, model(dtype)))


def named(params) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under PyTorch's names and in its layouts."""
    return weights.to_timm(params, model("float32"))


def pixels(normalised: np.ndarray) -> np.ndarray:
    return np.asarray(normalised, np.float64) * np.array(STD) + np.array(MEAN)


def objective(case: str) -> str:
    return case.split("_")[0]


def meta(case: str) -> dict:
    return json.loads(str(arrays(f"train_{case}")["meta"]))


def batch(case: str, dtype: str):
    """(images [8, 32, 32, 3] in [0, 1], targets [8, 10]) after mixing."""
    data, base = arrays(f"train_{case}"), arrays("model")
    images = base["images"] / np.float64(255)
    targets = data.get("soft_targets", np.eye(10)[base["labels"]])
    if "mix_lam" in data:
        flipped = images[::-1]
        if "cutmix_box" in data:
            top, bottom, left, right = data["cutmix_box"]
            images = images.copy()
            images[:, top:bottom, left:right] = flipped[:, top:bottom, left:right]
        else:
            lam = float(data["mix_lam"])
            images = lam * images + (1 - lam) * flipped
    return jnp.asarray(images, dtype), jnp.asarray(targets, dtype)


def draws(case: str, step: int, dtype: str) -> Draws:
    """What the reference drew in optimiser step 0 or 1."""
    data = arrays(f"train_{case}")
    unit = data["init_unit"][step].astype(np.float64)
    scale = THREAT.eps if objective(case) == "at" else START_SCALE * np.array(STD)
    if "ard_keep" not in data:
        return Draws(jnp.asarray(unit * scale, dtype), None, None)
    attn_keep = jnp.asarray(data["ard_keep"][step], bool)
    patch_keep = jnp.asarray(data["prm_keep"][step], bool)
    return Draws(jnp.asarray(unit * scale, dtype), attn_keep, patch_keep)


def fingerprint(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """[names, 3]: sum, L2 norm, and a cosine-weighted sum of each tensor."""
    rows = []
    for name in arrays("model")["param_names"]:
        t = np.asarray(tensors[str(name)], np.float64).ravel()
        wave = np.cos(0.1 + 0.7 * np.arange(t.size))
        rows.append([t.sum(), np.sqrt((t**2).sum()), (t * wave).sum()])
    return np.array(rows)
