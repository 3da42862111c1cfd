"""What timm must be told to build an exported model.

timm_arguments   the arguments of ``timm.create_model``
conv_stem        the widths of a stem that timm has not
is_timms         whether these arguments alone give the model
timm_config      ``config.json``, for ``timm.create_model("local-dir:PATH", pretrained=True)``
fold_scale       the attention's scale inside the weights, as timm's is fixed
"""

import re
from typing import Any

import numpy as np

from vit_at.errors import UserError
from vit_at.models.convit import ConViT
from vit_at.models.convnext import ConvNeXt
from vit_at.models.stem import conv_widths
from vit_at.models.swin import STAGES, SwinTransformer
from vit_at.models.vit import DistilledTransformer
from vit_at.models.xcit import XCiT

_FIRST_CONV = {ConvNeXt: "stem.0", XCiT: "patch_embed.proj.0.0"}


def timm_arguments(model: Any, name: str) -> dict[str, Any]:
    """The arguments of timm's ``create_model`` for this model, with its overrides.

    timm has no convolutional stem: with one, they describe all but the stem (see ``conv_stem``).

    Raises:
      UserError: timm has no such model.
    """
    if isinstance(model, ConvNeXt):
        return _of_convnext(model, name)
    arguments = {
        "model_name": re.sub("_in2[12]k$|_timm05$", "", name),  # one name for several weights
        "num_classes": model.num_classes,
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_channels,
        "mlp_ratio": model.mlp_ratio,
    }
    if isinstance(model, SwinTransformer):
        return arguments | {
            "embed_dim": model.embed_dim,
            "depths": list(model.depths),
            "num_heads": [model.num_heads * 2**i for i in range(STAGES)],
            "window_size": model.window_size,
        }
    arguments |= {"depth": model.depth, "num_heads": model.num_heads}
    if isinstance(model, XCiT):
        if model.patch_size != 2**model.convolutions:
            raise UserError(
                f"timm has no {name} with model.patch_size {model.patch_size}, so it can't be "
                f"exported; one with {2**model.convolutions} can"
            )
        arguments["model_name"] = re.sub("(medium|large)_12", r"\1_24", name)  # timm has no such
        own = {"tokens_norm": model.tokens_norm, "eta": model.layer_scale}
        return arguments | own | {"embed_dim": model.embed_dim}
    if isinstance(model, ConViT):  # timm counts its width per head
        width = model.embed_dim // model.num_heads
        return arguments | {"embed_dim": width, "local_up_to_layer": model.local_blocks}
    return arguments | {"embed_dim": model.embed_dim, "qkv_bias": model.qkv_bias}


def _of_convnext(model: ConvNeXt, name: str) -> dict[str, Any]:
    if model.stem != "patch" or model.mlp_ratio != 4:
        raise UserError(
            f"timm has no {name} with model.stem '{model.stem}' and model.mlp_ratio "
            f"{model.mlp_ratio:g}, so it can't be exported; those with 'patch' and 4 can"
        )
    return {
        "model_name": name,
        "num_classes": model.num_classes,
        "in_chans": model.in_channels,
        "patch_size": model.patch_size,
        "depths": list(model.depths),
        "dims": [model.embed_dim * 2**i for i in range(STAGES)],
    }


def conv_stem(model: Any) -> list[int] | None:
    """The widths of a convolutional stem (``models.stem.ConvStem``); None for a linear one."""
    if getattr(model, "stem", "patch") != "conv":
        return None
    return conv_widths(model.patch_size, model.embed_dim)


def is_timms(model: Any) -> bool:
    """Whether timm builds the model itself: no convolutional stem, and timm's LayerNorm eps."""
    eps = 1e-5 if isinstance(model, SwinTransformer) else 1e-6
    return conv_stem(model) is None and model.norm_eps == eps


def timm_config(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """timm's ``config.json``, for a model that timm builds itself.

    metadata: of ``reporting.exported.export``.
    """
    arguments = timm_arguments(model, metadata["architecture"])
    hierarchical = isinstance(model, (SwinTransformer, ConvNeXt))
    classifier: str | list[str] = "head.fc" if hierarchical else "head"
    if isinstance(model, DistilledTransformer):
        classifier = ["head", "head_dist"]
    config = {
        "architecture": arguments.pop("model_name"),
        "num_classes": model.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.in_channels, model.image_size, model.image_size],
            "fixed_input_size": True,
            "num_classes": model.num_classes,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            **metadata["normalisation"],
            "first_conv": _FIRST_CONV.get(type(model), "patch_embed.proj"),
            "classifier": classifier,
        },
    }
    names = metadata.get("checkpoint", {}).get("class_names")
    return config | ({"label_names": list(names)} if names else {})


def fold_scale(state_dict: dict[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """Multiplies an attention scale other than timm's into the queries' weights."""
    if not model.qk_scale:
        return state_dict
    factor = model.qk_scale * (model.embed_dim // model.num_heads) ** 0.5
    folded = dict(state_dict)
    for name, value in state_dict.items():
        match = re.search(r"\.attn\.(qkv|qk)\.(weight|bias)$", name)
        if match:
            value = value.copy()
            value[: len(value) // len(match[1])] *= factor
            folded[name] = value
    return folded
