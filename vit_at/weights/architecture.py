"""Reads an architecture from the shapes of its weights.

sizes_of        what the shapes say: width, depth, patch, classes, ...
names_of        the names of ``models.NAMES`` that have these blocks
hint            a sentence that names the right model, where the weights are those of another
arguments_for   the arguments of ``models.create`` for weights under a name

The number of heads can't be read from a ViT or DeiT, whose attention has one matrix for all heads.
"""

import math
import re
from typing import Any

from vit_at import models
from vit_at.errors import UserError
from vit_at.models import convit, swin, vit
from vit_at.weights.forms import StateDict

_FAMILIES = {
    "ViT": vit.VisionTransformer,
    "distilled DeiT": vit.DistilledTransformer,
    "ConViT": convit.ConViT,
    "Swin": swin.SwinTransformer,
}
# What distinguishes named models, besides patch and image.
_TRUNK = ("embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "window_size")
_BLOCK = re.compile(r"((?:layers\.\d+\.)?blocks\.\d+)\.mlp\.fc1\.weight")


def sizes_of(arrays: StateDict) -> dict[str, Any]:
    """What shapes say, as fields of a model, and its 'family'; {} if they are of no known one."""
    shapes = {name: value.shape for name, value in arrays.items()}
    hidden = {match[1]: shapes[name] for name in shapes if (match := _BLOCK.fullmatch(name))}
    sides = _patches(shapes)
    if not (hidden and sides) or any(len(shape) != 2 for shape in hidden.values()):
        return {}
    units, width = hidden[min(hidden)]
    sizes = sides | {"embed_dim": width, "depth": len(hidden), "mlp_ratio": units / max(width, 1)}
    head = shapes.get("head.weight", shapes.get("head.fc.weight", ()))
    if head:
        sizes["num_classes"] = head[0]
    extra = ("cls_token" in shapes) + ("dist_token" in shapes)
    if "layers.0.blocks.0.mlp.fc1.weight" in shapes:
        return sizes | {"family": "Swin"} | _windows(shapes, sides["patch_size"])
    if "blocks.0.attn.gating_param" in shapes:
        extra = 0  # the class token has no position
        sizes |= {"family": "ConViT", "num_heads": math.prod(shapes["blocks.0.attn.gating_param"])}
    else:
        sizes["family"] = "distilled DeiT" if "dist_token" in shapes else "ViT"
        sizes["qkv_bias"] = "blocks.0.attn.qkv.bias" in shapes
    positions = shapes.get("pos_embed", ())
    if len(positions) == 3 and (side := math.isqrt(max(positions[1] - extra, 0))):
        sizes["image_size"] = side * sides["patch_size"]
    return sizes


def _patches(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Stem, patch size and number of channels; {} if neither stem is there."""
    stem = "patch_embed.proj.stem"
    kernel = shapes.get("patch_embed.proj.weight", shapes.get(f"{stem}.0.weight", ()))
    if len(kernel) != 4:
        return {}
    if "patch_embed.proj.weight" in shapes:
        return {"stem": "patch", "patch_size": kernel[-1], "in_channels": kernel[1]}
    names = [name for name in shapes if name.startswith(stem) and shapes[name][-2:] == (3, 3)]
    return {"stem": "conv", "patch_size": 2 ** len(names), "in_channels": kernel[1]}


def _windows(shapes: dict[str, tuple[int, ...]], patch_size: int) -> dict[str, Any]:
    """Heads and window of a Swin; its image size, if a stage's grid is smaller than the window."""
    name = "layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [shapes.get(name.format(i), (1, 1)) for i in range(swin.STAGES)]
    windows = [(math.isqrt(table[0]) + 1) // 2 for table in tables]
    sizes = {"num_heads": tables[0][-1], "window_size": windows[0]}
    for stage, window in enumerate(windows):
        if window < windows[0]:
            return sizes | {"image_size": window * patch_size * 2**stage}
    return sizes


def _differences(sizes: dict[str, Any], model: Any, fields: tuple[str, ...]) -> list[str]:
    """The fields in which a model is not as the shapes say."""
    return [f for f in fields if f in sizes and sizes[f] != getattr(model, f)]


def _is_named(sizes: dict[str, Any], model: Any) -> bool:
    """Whether a model has these blocks."""
    family = type(model) is _FAMILIES.get(sizes["family"])
    return family and not _differences(sizes, model, _TRUNK)


def names_of(sizes: dict[str, Any]) -> list[str]:
    """The names of models with these blocks; those with this patch and image alone, if any."""
    named = {name: models.create(name, num_classes=1) for name in models.NAMES}
    alike = [name for name, model in named.items() if _is_named(sizes, model)]
    sides = ("patch_size", "image_size")
    exact = [name for name in alike if not _differences(sizes, named[name], sides)]
    return exact or alike


def hint(arrays: StateDict, model: Any) -> str:
    """What to choose in place of ``model``, if these are weights of another model that has a name.

    '' if they have the model's blocks, or nobody's.
    """
    sizes = sizes_of(arrays)
    if not sizes or _is_named(sizes, model):
        return ""
    width = f"{sizes['embed_dim']} wide and {sizes['depth']} blocks deep"
    if names := names_of(sizes):
        return f"they are {width}, the shape of {' or '.join(names[:3])}: choose that name"
    if type(model) is not _FAMILIES[sizes["family"]]:
        return f"they are those of a {sizes['family']}, {width}: choose the name of one"
    return ""


def arguments_for(arrays: StateDict, name: str, num_heads: int = 0) -> dict[str, Any]:
    """The arguments of ``models.create`` for weights of a model that timm calls ``name``.

    Width, depth, MLP, patch, stem, window, image size and number of classes are those of the
    shapes.

    num_heads: 0: what the shapes say, else those of ``name``.

    Raises:
      UserError: the weights are those of another named model, or the number of heads is needed, or
        is not the weights'.
    """
    named = models.create(name, num_classes=1)
    if said := hint(arrays, named):
        raise UserError(f"the weights are not those of {name}; {said}")
    sizes = sizes_of(arrays)
    sizes.pop("family", None)
    if num_heads and sizes.get("num_heads", num_heads) != num_heads:
        raise UserError(
            f"--num_heads is {num_heads}, but the weights have {sizes['num_heads']}; leave it out"
        )
    if not sizes:  # an architecture whose shapes are not read
        head = next((arrays[n] for n in ("head.weight", "head.fc.weight") if n in arrays), None)
        sizes = {} if head is None else {"num_classes": len(head)}
    elif "num_heads" not in sizes and sizes["embed_dim"] != named.embed_dim and not num_heads:
        raise UserError(
            f"the weights are {sizes['embed_dim']} wide and {name} is {named.embed_dim}, so its "
            f"{named.num_heads} heads are not theirs, and shapes don't show heads: give "
            "--num_heads"
        )
    return {"num_classes": 1000} | sizes | ({"num_heads": num_heads} if num_heads else {})
