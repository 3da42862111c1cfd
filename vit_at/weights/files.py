"""Reads weight files to {timm name: array}; never executes code from a file.

.safetensors         plain arrays
.npz                 plain arrays, with timm's names or Google's (the original ViT and AugReg)
.pth .pt .bin        pickles, only through ``torch.load(weights_only=True)``, if torch is installed
hf:owner/name        model.safetensors of a repository on the Hugging Face hub

One of these suffixes chooses the reader, whatever the content. A file with no or another suffix is
read by the reader that its first bytes name; each reader is as safe for any content. Before a
reader opens a file, its size and its first bytes are checked. ``forms`` says which wrappings of a
state_dict are recognised.
"""

import contextlib
import json
import os
import pathlib
import pickle
import re
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import safetensors.numpy

from vit_at.errors import UserError, in_one_line
from vit_at.weights.forms import (
    NESTINGS,
    Plain,
    StateDict,
    from_google,
    in_words,
    plain,
    unwrap,
)

HUB_PREFIX = "hf:"
HUB_FILE = "model.safetensors"
_HUB_CONFIG = "config.json"  # timm's, beside it: has the normalisation
_HUB_TIMEOUT = 5.0  # seconds
_LARGEST = 8 * 2**30  # bytes of all arrays of a file; the largest model has 1.3 GiB
_MISTAKEN = {  # first bytes of files that are often stored in place of weights
    b"version https://git-lfs": "a Git LFS pointer; run 'git lfs pull' to get the weights",
    b"<!doctype": "a web page; download the weights themselves",
    b"<html": "a web page; download the weights themselves",
}
_WAYS_ON = (
    "give a file (PATH.safetensors), a work directory of vit_at (runs/NAME), or train from scratch "
    "(--config.model.pretrained='')"
)


def load(source: str | os.PathLike) -> StateDict:
    """Reads weights.

    Prefixes such as 'module.', nesting and a normalisation are removed; a line on stderr says so.

    Args:
      source: a .safetensors, .npz, .pth, .pt or .bin file, or one of these formats without a
        suffix; a directory with a model.safetensors;
        or a name on the Hugging Face hub such as 'hf:timm/deit_tiny_patch16_224.fb_in1k',
        optionally with '@revision'. A file from the hub is downloaded once and cached.

    Returns:
      {name: array} under timm's names.

    Raises:
      UserError: the file is missing, damaged, too large or of an unknown format, or holds more than
        plain arrays.
    """
    return _read(source, config_beside=False).arrays


def read(source: str | os.PathLike) -> Plain:
    """``load`` with the normalisation of the file, or of timm's ``config.json`` beside it."""
    return _read(source, config_beside=True)


def _read(source: str | os.PathLike, *, config_beside: bool) -> Plain:
    source = os.fspath(source)
    if source.startswith(HUB_PREFIX):
        path = fetch(source[len(HUB_PREFIX) :])
    else:
        path = pathlib.Path(os.path.expanduser(source))
        if path.is_dir():
            path = path / HUB_FILE
    if not path.is_file():
        of_a_run = path.parts[:1] == ("runs",)
        first = "make this run first ('vit-at recipes NAME' says how), " if of_a_run else ""
        raise UserError(f"there is no weight file '{path}'; {first}{_WAYS_ON}")
    suffix = path.suffix if path.suffix in _READERS else _suffix_by_content(path)
    if not suffix:
        raise UserError(
            f"weight file '{path}' has an unknown suffix; convert it to one of "
            f"{', '.join(_READERS)}"
        )
    _check_first_bytes(path)
    try:
        _check_size(path, _stored_size(path))
        state_dict = {name: np.asarray(v) for name, v in _READERS[suffix](path).items()}
    except UserError:
        raise
    except Exception as error:  # of a damaged file: readers raise many, such as zlib.error
        reason = in_one_line(error, 120)
        raise UserError(
            f"weight file '{path}' is damaged or no {suffix} file ({reason}); download it again"
        ) from error
    if not state_dict:
        raise UserError(f"weight file '{path}' holds no arrays; choose another file")
    _check_size(path, sum(value.nbytes for value in state_dict.values()))
    found = plain(state_dict)
    if config_beside and path.name == HUB_FILE and not found.mean:
        found = _with_config(found, path.parent / _HUB_CONFIG)
    if found.recognised:
        print(f"{path.name}: {found.recognised}", file=sys.stderr)
    return found


def _with_config(found: Plain, config: pathlib.Path) -> Plain:
    """The weights with the normalisation of timm's ``config.json``, if there is such a file."""
    try:
        about = json.loads(config.read_bytes())["pretrained_cfg"]
        mean, std = (tuple(map(float, about[kind])) for kind in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not timm's
        return found
    said = f"normalisation taken from {config.name}: mean {in_words(mean)}, std {in_words(std)}"
    said = "; ".join(filter(None, [found.recognised, said]))
    return found._replace(mean=mean, std=std, recognised=said)


def _suffix_by_content(path: pathlib.Path) -> str:
    """The suffix of the format that a file's first bytes name; '' if they name none."""
    with contextlib.suppress(OSError, zipfile.BadZipFile):
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                arrays = all(name.endswith(".npy") for name in archive.namelist())
            return ".npz" if arrays else ".pth"
        if re.match(rb"\x80[\x02-\x05]", start):
            return ".pth"
        if start[8:] == b"{":
            return ".safetensors"
    return ""


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
        return from_google(arrays, path)
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
    content, prefix = unwrap(content)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise UserError(
            f"weight file '{path}' holds no state_dict; choose a file of named tensors, at the top "
            f"level or under one of {', '.join(NESTINGS)}"
        )
    return {prefix + name: _array(path, name, tensor) for name, tensor in content.items()}


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
        with contextlib.suppress(Exception):  # not all have it
            hub.hf_hub_download(**wanted | {"filename": _HUB_CONFIG})
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
