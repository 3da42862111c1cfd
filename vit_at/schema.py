"""What the files that are read back must hold: each has one type, checked once when it is read.

read_json      a JSON file whose values have a type's shape
check          the same for values that are parsed already
fields_of      the type of a tree of default values
read_arrays    an .npz file whose arrays have the dtypes and dimensions of a type
Record ...     the types

A value that a type does not name is allowed, so that files of later versions can be read.
"""

import io
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import numpy as np
from etils import epath

from vit_at.errors import UserError, in_one_line

_KINDS = {"bool": "b", "integers": "iu", "floats": "f", "text": "U"}  # as in np.dtype.kind
_LARGEST = sys.float_info.max
Number = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]  # finite
Positive = Annotated[float, msgspec.Meta(ge=0, le=_LARGEST)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Weights(TypedDict):
    """Which weights were measured."""

    digest: str
    checkpoint: NotRequired[str]
    step: NotRequired[Count]


class NormBall(TypedDict):
    """One of the threats of a union over norms."""

    norm: str
    eps: Positive
    step_size: NotRequired[Positive]


class Transfer(TypedDict):
    """For which model adversarial images were made, by name and digest, and on which measured."""

    source: str
    digest: str
    target: str


class Protocol(TypedDict):
    """What a result was measured on."""

    data: str
    num_examples: Count
    weights: Weights
    transform: NotRequired[str]
    ids: NotRequired[str]
    contents: NotRequired[str]
    seed: NotRequired[Seed]
    norm: NotRequired[str]
    eps: NotRequired[Positive]
    step_size: NotRequired[Positive]
    restarts: NotRequired[Count]
    transfer: NotRequired[Transfer]


class ThreatProtocol(Protocol):
    """That of an attack with a threat model."""

    seed: Seed
    norm: str
    eps: Positive


class StepsProtocol(ThreatProtocol):
    """That of an attack that takes steps of one size."""

    step_size: Positive
    restarts: Count


class UnionProtocol(Protocol):
    """That of the worst case over norms."""

    seed: Seed
    union: list[NormBall]


class Record(TypedDict):
    """An entry of ``results.json``."""

    attack: str
    accuracy: Share
    standard_error: Positive
    protocol: Protocol
    cascade: NotRequired[dict[str, Share]]
    audit: NotRequired[dict[str, Any]]
    unverified: NotRequired[dict[str, str]]
    flags: NotRequired[dict[str, str]]
    notes: NotRequired[list[str]]


class WeightsFile(TypedDict):
    """The weights that ``model.json`` describes."""

    sha256: str


class Checkpoint(TypedDict):
    """Where exported weights come from."""

    step: Count


class Description(TypedDict):
    """``model.json``."""

    training: dict[str, Any]
    results: NotRequired[list[Any]]
    checkpoint: Checkpoint
    num_classes: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    weights: WeightsFile


class StudyRun(TypedDict):
    """A run of a study file, without what all runs share."""

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    curves: NotRequired[dict[str, tuple[list[float], list[float]]]]


class Study(TypedDict):
    """A study file."""

    config: dict[str, Any]
    protocols: dict[str, dict[str, Any]]
    runs: Annotated[list[StudyRun], msgspec.Meta(min_length=1)]


_Length = (
    Annotated[str, msgspec.Meta(pattern=r"^\d{1,10}$")]
    | Annotated[int, msgspec.Meta(ge=0, lt=10**10)]
)


class Split(TypedDict):
    """A split in ``dataset_info.json``."""

    name: str
    shardLengths: NotRequired[list[_Length]]


class DatasetInfo(TypedDict):
    """``dataset_info.json`` of TFDS."""

    name: str
    version: str
    splits: list[Split]
    fileFormat: NotRequired[str]
    alternativeFileFormats: NotRequired[list[str]]


def fields_of(defaults: dict[str, Any], optional: Iterable[str] = (), prefix: str = "") -> Any:
    """The type of a tree that has the fields of ``defaults``, with values of the same types.

    optional: dotted fields that may be missing.
    """
    fields: list[Any] = []
    for name, value in defaults.items():
        missing = prefix + name in optional
        if isinstance(value, dict):
            kind = fields_of(value, optional, f"{prefix}{name}.")
            missing = all(f"{prefix}{name}.{field}" in optional for field in value)
        elif isinstance(value, tuple):
            kind = list[Number]
        else:
            kind = {int: int, float: Number}.get(type(value), type(value))
        fields.append((name, kind, None) if missing else (name, kind))
    return msgspec.defstruct(prefix or "Fields", fields, kw_only=True)


def check(
    value: Any,
    kind: Any,
    path: epath.PathLike,
    remedy: str,
    *,
    what: str = "damaged",
    inside: str = "",
) -> Any:
    """The value itself, if it has the shape of a type; a UserError says where it has not.

    path: of the file that holds the value; inside: where in it; what: what such a file is called.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).partition(" - at ")
        place = place.strip("`").removeprefix("$")
        found, place = _shown(_at(value, place)), f"{inside}{place}".removeprefix(".")
        raise UserError(
            f"{path} is {what} ({place or 'the whole'} is {found}: "
            f"{wrong[:1].lower()}{wrong[1:]}); {remedy}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path} is {what} (it is nested too deeply); {remedy}") from error
    return value


def _at(value: Any, place: str) -> Any:
    """The value at a place such as '[0].protocol.eps'; the last one before an unnamed key."""
    for key, index in re.findall(r"(\w+)|\[(\d+|\.\.\.)\]", place):
        if index == "...":
            return value
        value = value[int(index) if index else key]
    return value


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "..."
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_json(path: epath.Path, kind: Any, remedy: str, *, nan: bool = False) -> Any:
    """The values of a JSON file, of the shape of a type.

    nan: allow NaN and infinities.

    Raises:
      UserError: it is not a regular file of valid JSON in UTF-8 without duplicate names, or has
        another shape.
    """
    return parse_json(content_of(path, remedy), kind, path, remedy, nan=nan)


def parse_json(content: bytes, kind: Any, path: epath.Path, remedy: str, *, nan: bool) -> Any:
    """``read_json`` of what a file holds."""
    options: dict[str, Any] = {} if nan else {"parse_constant": _refuse}
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique, **options)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply; {remedy}") from error
    except ValueError as error:  # also of UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error
    return check(value, kind, path, remedy)


def content_of(path: epath.Path, remedy: str) -> bytes:
    """What a regular file holds; a UserError for a directory, a pipe or a device."""
    if not is_regular(path):
        raise UserError(f"{path} is missing, or not a regular file; {remedy}")
    return path.read_bytes()


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store such as gs://, without appending and locks."""
    return "://" in str(path)


def is_regular(path: epath.Path) -> bool:
    """Whether a path is a file that can be read to its end: no directory, pipe or device."""
    return path.is_file() if is_remote(path) else os.path.isfile(path)  # epath's takes a pipe


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice:.40}' stands twice in one object")
    return found


def read_arrays(path: epath.Path, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing in it is executed.

    Raises:
      UserError: it is not a regular file, no .npz file, cut short, or holds Python objects.
    """
    content = content_of(path, remedy)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # NumPy and zipfile raise many
        reason = in_one_line(error, 200)
        if "pickle" in reason:  # NumPy's own text says how to load it unsafely
            reason = "it holds Python objects, which could run a program"
        raise UserError(f"{path} can't be read as an .npz file ({reason}); {remedy}") from error


def check_array(
    arrays: dict[str, np.ndarray],
    name: str,
    kind: str,
    shape: tuple[int, ...],
    path: epath.Path,
    remedy: str,
) -> np.ndarray:
    """An array of a file; a UserError if it is missing, or has another dtype or shape.

    kind: 'bool', 'integers', 'floats' or 'text'; shape: -1 fits any size.
    """
    if name not in arrays:
        raise UserError(f"{path} is damaged (it has no array '{name}'); {remedy}")
    array = arrays[name]
    fits = len(array.shape) == len(shape) and all(
        size in (-1, own) for size, own in zip(shape, array.shape, strict=True)
    )
    if array.dtype.kind not in _KINDS[kind] or not fits:
        sizes = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise UserError(
            f"{path} is damaged (its array '{name}' is {array.dtype}{list(array.shape)}, and must "
            f"be {kind}[{sizes}]); {remedy}"
        )
    return array
