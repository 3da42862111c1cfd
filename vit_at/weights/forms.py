"""The forms in which weights of other people come, as the arrays of one model under timm's names.

unwrap        the state_dict inside the nested dicts of a checkpoint
plain         names without the prefixes of wrapping modules; the normalisation apart
from_google   the names and layouts of the original ViT and AugReg

PyTorch's ``DataParallel`` names arrays ``module.*``. RobustBench wraps a model as
``Sequential(normalize, model)``: ``model.*`` beside ``normalize.mean`` and ``normalize.std``.
"""

import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from vit_at.errors import UserError

StateDict = dict[str, np.ndarray]
# Under which a checkpoint holds its state_dict; averaged weights first, as in timm.
NESTINGS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "model_state_dict",
    "state_dict",
    "model",
)
_STATISTICS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}


class Plain(NamedTuple):
    """Arrays under timm's names, and the normalisation if the file has it.

    mean, std: per channel, in units of images in [0, 1]; () if the file has none.
    recognised: what was removed, in words; '' if nothing was.
    """

    arrays: StateDict
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    recognised: str = ""


def unwrap(content: Any) -> tuple[Any, str]:
    """(what lies inside nested dicts, its place in front of names, such as 'state_dict.')."""
    prefix = ""
    while isinstance(content, dict):
        key = next((k for k in NESTINGS if isinstance(content.get(k), dict)), None)
        if key is None:
            break
        content, prefix = content[key], f"{prefix}{key}."
    return content, prefix


def plain(arrays: StateDict) -> Plain:
    """Removes the prefix that all names share, and the normalisation."""
    found: dict[str, list[str]] = {"mean": [], "std": []}
    for name, value in arrays.items():
        kind = _STATISTICS.get(name.rpartition(".")[2])
        if kind and value.size in (1, 3) and np.issubdtype(value.dtype, np.floating):
            found[kind].append(name)
    notes: list[str] = []
    statistics: dict[str, tuple[float, ...]] = {}
    if len(found["mean"]) == len(found["std"]) == 1:
        statistics = {kind: _numbers(arrays[name]) for kind, (name,) in found.items()}
        arrays = {n: v for n, v in arrays.items() if [n] not in found.values()}
        values = ", ".join(f"{kind} {in_words(value)}" for kind, value in statistics.items())
        notes.append(f"normalisation taken from the file: {values}")
    columns = zip(*(name.split(".")[:-1] for name in arrays), strict=False)  # up to the shortest
    shared = [names[0] for names in itertools.takewhile(lambda c: len(set(c)) == 1, columns)]
    if shared:
        prefix = ".".join([*shared, ""])
        notes.insert(0, f"prefix '{prefix}' removed")
        arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    return Plain(arrays, **statistics, recognised="; ".join(notes))


def _numbers(value: np.ndarray) -> tuple[float, ...]:
    """The numbers of an array, as they were written before they became float32."""
    return tuple(float(f"{number:.7g}") for number in value.ravel().astype(np.float64))


def in_words(values: tuple[float, ...]) -> str:
    """(0.485, 0.456, 0.406) as '0.485,0.456,0.406', as --mean takes them."""
    return ",".join(f"{value:.4g}" for value in values)


def from_google(arrays: StateDict, path: pathlib.Path) -> StateDict:
    """Converts Google's names and layouts (the original ViT and AugReg) to timm's.

    Google stores query, key and value separately, with kernels [d, heads, head_dim], and the output
    kernel as [heads, head_dim, d].
    """
    left = dict(arrays)
    out: StateDict = {}

    def move(timm: str, google: str) -> None:
        """Moves a dense layer, a convolution or a LayerNorm."""
        weight = left.pop(f"{google}/scale", None)
        if weight is None:
            kernel = left.pop(f"{google}/kernel")
            flat = kernel.reshape(-1, kernel.shape[-1])  # attention's has an axis of heads
            weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else flat.T
        out[f"{timm}.weight"], out[f"{timm}.bias"] = weight, left.pop(f"{google}/bias")

    def move_block(timm: str, google: str) -> None:
        move(f"{timm}.norm1", f"{google}/LayerNorm_0")
        move(f"{timm}.norm2", f"{google}/LayerNorm_2")
        for i in range(2):
            move(f"{timm}.mlp.fc{i + 1}", f"{google}/MlpBlock_3/Dense_{i}")
        attention = f"{google}/MultiHeadDotProductAttention_1"
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        kernels = [left.pop(f"{part}/kernel") for part in parts]
        d = len(kernels[0])
        out[f"{timm}.attn.qkv.weight"] = np.concatenate([k.reshape(d, -1).T for k in kernels])
        biases = [left.pop(f"{part}/bias").reshape(-1) for part in parts]
        out[f"{timm}.attn.qkv.bias"] = np.concatenate(biases)
        move(f"{timm}.attn.proj", f"{attention}/out")

    try:
        out["cls_token"] = left.pop("cls")
        out["pos_embed"] = left.pop("Transformer/posembed_input/pos_embedding")
        move("patch_embed.proj", "embedding")
        i = 0
        while f"Transformer/encoderblock_{i}/LayerNorm_0/scale" in left:
            move_block(f"blocks.{i}", f"Transformer/encoderblock_{i}")
            i += 1
        move("norm", "Transformer/encoder_norm")
        if "pre_logits/kernel" in left:
            move("pre_logits.fc", "pre_logits")
        if "head/kernel" in left:
            move("head", "head")
    except KeyError as error:
        raise UserError(
            f"weight file '{path}' has Google's ViT names but lacks {error}; download it again"
        ) from error
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"weight file '{path}' has Google's ViT names but not their shapes ({error}); download "
            "it again"
        ) from error
    return out | left
