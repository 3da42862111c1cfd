"""Reads weight files to {timm name: array}; never executes code from a file.

.safetensors         plain arrays
.npz                 plain arrays, with timm's names or Google's (the original ViT and AugReg)
.pth .pt .bin        pickles, only through ``torch.load(weights_only=True)``, if torch is installed
hf:owner/name        model.safetensors of a repository on the Hugging Face hub

The suffix alone chooses the reader, never the content. Before a reader opens a file, its size and
its first bytes are checked.
"""

import contextlib
import json
import os
import pathlib
import pickle
import re
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import safetensors.numpy

from vit_at.errors import UserError, in_one_line

HUB_PREFIX = "hf:"
HUB_FILE = "model.safetensors"
_HUB_TIMEOUT = 5.0  # seconds
_LARGEST = 8 * 2**30  # bytes of all arrays of a file; the largest model has 1.3 GiB
_MISTAKEN = {  # first bytes of files that are often stored in place of weights
    b"version https://git-lfs": "a Git LFS pointer; run 'git lfs pull' to get the weights",
    b"<!doctype": "a web page; download the weights themselves",
    b"<html": "a web page; download the weights themselves",
}
_WAYS_ON = (
    "give a file (--config.model.pretrained=PATH.safetensors), a work directory of vit_at "
    "(--config.model.pretrained=runs/NAME), or train from scratch (--config.model.pretrained='')"
)

StateDict = dict[str, np.ndarray]


def load(source: str | os.PathLike) -> StateDict:
    """Reads weights.

    Args:
      source: a .safetensors, .npz, .pth, .pt or .bin file; a directory with a model.safetensors;
        or a name on the Hugging Face hub such as 'hf:timm/deit_tiny_patch16_224.fb_in1k',
        optionally with '@revision'. A file from the hub is downloaded once and cached.

    Returns:
      {name: array} under timm's names.

    Raises:
      UserError: the file is missing, damaged, too large or of an unknown format, or holds more than
        plain arrays.
    """
    source = os.fspath(source)
    if source.startswith(HUB_PREFIX):
        path = fetch(source[len(HUB_PREFIX) :])
    else:
        path = pathlib.Path(os.path.expanduser(source))
        if path.is_dir():
            path = path / HUB_FILE
    if not path.is_file():
        raise UserError(f"there is no weight file '{path}'; {_WAYS_ON}")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(
            f"weight file '{path}' has an unknown suffix; convert it to one of "
            f"{', '.join(_READERS)}"
        )
    _check_first_bytes(path)
    try:
        _check_size(path, _stored_size(path))
        state_dict = {name: np.asarray(value) for name, value in reader(path).items()}
    except UserError:
        raise
    except Exception as error:  # of a damaged file: readers raise many, such as zlib.error
        reason = in_one_line(error, 120)
        raise UserError(
            f"weight file '{path}' is damaged or no {path.suffix} file ({reason}); download it "
            "again"
        ) from error
    if not state_dict:
        raise UserError(f"weight file '{path}' holds no arrays; choose another file")
    _check_size(path, sum(value.nbytes for value in state_dict.values()))
    return state_dict


def _check_first_bytes(path: pathlib.Path) -> None:
    """Refuses an empty file, a web page and a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise UserError(
            f"weight file '{path}' can't be read ({error.strerror}); correct its permissions, or "
            "choose another file"
        ) from error
    if not start:
        raise UserError(f"weight file '{path}' is empty; download it again")
    for mistaken, what in _MISTAKEN.items():
        if start.startswith(mistaken):
            raise UserError(f"weight file '{path}' is {what}")


def _stored_size(path: pathlib.Path) -> int:
    """Bytes of the file, unpacked if it is a zip archive; ValueError if a name occurs twice."""
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    _unique([(member.filename, member.file_size) for member in members])
    return sum(member.file_size for member in members)


def _check_size(path: pathlib.Path, size: int) -> None:
    if size > _LARGEST:
        raise UserError(
            f"weight file '{path}' holds {size / 2**30:.1f} GiB of arrays, more than the "
            f"{_LARGEST >> 30} GiB allowed; choose a file with the weights of one model"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of these pairs; ValueError if a name occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse_array(path: pathlib.Path, name: str, kind: str) -> NoReturn:
    raise UserError(
        f"weight file '{path}' holds {name[:120]!r} as {kind}; convert it to a dense float32 array"
    )


def _read_safetensors(path: pathlib.Path) -> StateDict:
    with safetensors.safe_open(path, framework="numpy"), path.open("rb") as file:
        # The header is valid, or safe_open had raised.
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    for name, about in header.items():
        if re.match(r"F(4|6_|8_)", about["dtype"]):
            _refuse_array(path, name, about["dtype"])
    return safetensors.numpy.load_file(path)


def _read_npz(path: pathlib.Path) -> StateDict:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    prefix = "opt/target/" if "opt/target/embedding/kernel" in arrays else ""
    if f"{prefix}embedding/kernel" in arrays:
        arrays = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        return _from_google(arrays, path)
    return arrays


def _read_torch(path: pathlib.Path) -> StateDict:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading '{path}' needs PyTorch, which is not installed; pip install torch, or "
            "convert the file to .safetensors elsewhere"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of the format, for whoever wrote the file
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weight file '{path}' is damaged or a pickle with more than plain arrays, and "
            "nothing in it was run; choose a file that holds only a state_dict"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise UserError(
            f"weight file '{path}' holds no state_dict; choose a file of named tensors, at the top "
            "level or under 'model' or 'state_dict'"
        )
    return {name: _array(path, name, tensor) for name, tensor in content.items()}


def _array(path: pathlib.Path, name: str, tensor: Any) -> np.ndarray:
    """A tensor of PyTorch's as an array; UserError if it is not dense, or of an unknown type."""
    import torch

    try:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        bfloat16 = tensor.dtype == torch.bfloat16  # not in NumPy
        return (tensor.float() if bfloat16 else tensor).numpy()
    except (RuntimeError, TypeError):
        _refuse_array(path, name, f"{tensor.layout} {tensor.dtype} on '{tensor.device}'")


_READERS: Mapping[str, Callable[[pathlib.Path], StateDict]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
} | dict.fromkeys((".pth", ".pt", ".bin"), _read_torch)


def fetch(name: str, file: str = HUB_FILE) -> pathlib.Path:
    """A file of the hub's repository OWNER/NAME[@REVISION] in the local cache.

    It is downloaded if necessary. Files of one repository lie in one directory.

    Raises:
      UserError: the name is malformed, or the file is not cached and can't be downloaded.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name, re.ASCII):
        raise UserError(f"'{HUB_PREFIX}{name}' is no name; write {HUB_PREFIX}OWNER/NAME[@REVISION]")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(
            f"'{HUB_PREFIX}{name}' needs huggingface_hub, which is not installed; pip install "
            f"huggingface_hub, or {_WAYS_ON}"
        ) from error
    repository, _, revision = name.partition("@")
    wanted = {"repo_id": repository, "filename": file, "revision": revision or None}
    with contextlib.suppress(Exception):  # not cached; the type depends on the hub's version
        return pathlib.Path(hub.hf_hub_download(**wanted, local_files_only=True))
    try:
        _check_reachable(hub.constants.ENDPOINT)
        return pathlib.Path(hub.hf_hub_download(**wanted))
    except Exception as error:
        reason = in_one_line(error, 160)
        raise UserError(
            f"'{HUB_PREFIX}{name}' is not cached and can't be downloaded ({reason}); {_WAYS_ON}"
        ) from error


def _check_reachable(address: str) -> None:
    """Raises OSError if the hub does not answer; its library would retry for half a minute."""
    request = urllib.request.Request(address, method="HEAD")
    # Any HTTP answer will do, such as a proxy that refuses HEAD.
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT).close()


def _from_google(arrays: StateDict, path: pathlib.Path) -> StateDict:
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
