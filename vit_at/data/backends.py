"""Opens TFDS data sets and the packaged digits; ``folders`` opens image folders and arrays.

Each `open_*` gives a split as `Encoded`: image files that are still compressed, read by row. TFDS
data sets are read from array_record files, without TensorFlow. They must be prepared first, by
``vit-at prepare NAME``. Opening never downloads: a missing data set is an error at once.
"""

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from PIL import Image

from vit_at.errors import UserError, in_one_line, nearest
from vit_at.schema import DatasetInfo, is_remote, read_json

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of PIL; JPEG includes the MPO files of cameras
PACKAGED = Path(__file__).parent / "packaged"
INFO_FILE = "dataset_info.json"
_FEATURES_FILE = "features.json"
_FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+")


class Encoded(NamedTuple):
    """A split as a backend opens it: encoded images and labels by row."""

    name: str
    class_names: tuple[str, ...]
    indices: np.ndarray  # [n] position in the split on disk of each row
    fetch: Callable[[Sequence[int]], list[tuple[bytes, int]]]  # rows -> encoded images, labels
    where: Callable[[int], str]  # row -> the image's name in an error message
    names: Callable[[], list[str]]  # 'CLASS/FILE' of every row
    origin: list[tuple[str, np.ndarray]]  # (split on disk, positions in it) of all rows
    fingerprint: Callable[[], str]  # of all files that are read, to recognise a change
    contents: Callable[[], str]  # a digest of what tells the images from others, equal for a copy
    source: str = ""  # where the splits lie, however the configuration spells it


def headers(encoded: Encoded, count: int = 32) -> list[tuple[int, int, str]]:
    """(width, height, PIL mode) of up to ``count`` images, evenly spaced over the rows.

    Images that can't be opened are left out: reading them says what is wrong.
    """
    n = len(encoded.indices)
    found = []
    for row in np.unique(np.linspace(0, n - 1, min(n, count)).astype(int)).tolist():
        with contextlib.suppress(Exception):  # of the disk, array_record, TFDS and PIL
            content = encoded.fetch([row])[0][0]
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                found.append((*image.size, image.mode))
    return found


def digest(text: str) -> str:
    """Twelve hexadecimal digits that tell a text from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split_rows(split: str, lengths: dict[str, int], name: str) -> list[tuple[str, np.ndarray]]:
    """The (split, positions) pairs that a split in TFDS's notation stands for."""
    infos = {
        key: tfds.core.SplitInfo(name=key, shard_lengths=[length], num_bytes=0)
        for key, length in lengths.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        known = ", ".join(f"{key} ({length})" for key, length in lengths.items())
        raise UserError(
            f"{name} has no split '{split}'; it has {known}, and slices are written as "
            "'train[:90%]' or 'test[:48]'"
        ) from error
    return [
        (part.splitname, np.arange(lengths[part.splitname])[part.from_ : part.to]) for part in parts
    ]


def check_regular(entries: Iterable[os.DirEntry]) -> None:
    """Raises UserError for a pipe, socket, device, directory or broken link; opens nothing."""
    for entry in entries:
        try:
            regular = entry.is_file()
        except OSError:  # a link that leads back to itself
            regular = False
        if not regular:
            raise UserError(f"{entry.path} is no regular file, or a broken link; remove it")


def tfds_directory(data_dir: str = "") -> epath.Path:
    """data.dir if it is set, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return epath.Path(chosen).expanduser()


def find_prepared(name: str, directory: epath.PathLike) -> epath.Path | None:
    """The newest prepared version of NAME[/CONFIG][:VERSION] in a TFDS directory, or None.

    UserError if the name has no config, and several are prepared.
    """
    name, _, version = name.partition(":")
    root = epath.Path(directory) / name
    versions = _versions(root)
    if not versions and root.is_dir() and "/" not in name:
        configs = {path.name: _versions(path) for path in root.iterdir() if path.is_dir()}
        configs = {config: found for config, found in configs.items() if found}
        if len(configs) > 1:
            raise UserError(
                f"data.name is '{name}', of which several configs are prepared "
                f"({', '.join(sorted(configs))}); choose one, as in '{name}/{min(configs)}'"
            )
        versions = next(iter(configs.values()), [])
    versions = [path for path in versions if version in ("", path.name)]
    return max(versions, key=lambda path: [int(x) for x in path.name.split(".")], default=None)


def _versions(root: epath.Path) -> list[epath.Path]:
    paths = root.iterdir() if root.is_dir() else ()
    return [
        path
        for path in paths
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / INFO_FILE).exists()
    ]


def check_known(name: str) -> None:
    """Raises UserError if TFDS has no such data set or config; names the nearest."""
    base, _, config = name.partition(":")[0].partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    kind, wrong, choices = "data set", base, ["digits", *known]
    if base in known:
        kind, wrong, choices = "config", config, list(tfds.builder_cls(base).builder_configs)
    if wrong and wrong not in choices:
        hint = f" (nearest: {nearest(wrong, choices)})" if choices else ""
        raise UserError(
            f"data.name is '{name}', but TFDS has no {kind} '{wrong}'{hint}; choose another, "
            "'digits' or 'folder:PATH'"
        )


def read_builder(prepared: epath.Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared data set, whose files are checked first.

    TFDS imports the module of each class that ``features.json`` names, so only its own are allowed.

    Raises:
      UserError: a file is damaged, names a foreign class, or is no regular file.
    """
    remedy = "prepare the data set again"
    if not is_remote(prepared):
        with os.scandir(prepared) as entries:
            check_regular(entry for entry in entries if not entry.is_dir())
    read_json(prepared / INFO_FILE, DatasetInfo, remedy)
    described = read_json(prepared / _FEATURES_FILE, dict[str, Any], remedy)
    for name in _feature_classes(described):
        if not _FEATURE_CLASS.fullmatch(name):
            raise UserError(
                f"{prepared / _FEATURES_FILE} names the class '{name:.60}', which is no feature of "
                "TFDS, so it is not imported; choose another data set, or correct the file"
            )
    try:
        return tfds.builder_from_directory(prepared)
    except Exception as error:  # TFDS and protobuf raise many
        reason = in_one_line(error, 200)
        raise UserError(f"{prepared} can't be read ({reason}); {remedy}") from error


def _feature_classes(value: Any) -> Iterator[str]:
    """What features.json names as a class, at any depth and in each spelling that TFDS accepts."""
    if isinstance(value, list):
        for inner in value:
            yield from _feature_classes(inner)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str):
                yield inner
            yield from _feature_classes(inner)


def is_array_record(info: tfds.core.DatasetInfo) -> bool:
    """Whether array_record files are there, the one format read without TensorFlow."""
    return tfds.core.FileFormat.ARRAY_RECORD in (info.file_format, *info.alternative_file_formats)


def open_tfds(name: str, data_dir: str, split: str) -> Encoded:
    """Opens a prepared TFDS data set, or the packaged 'digits'."""
    directory = epath.Path(PACKAGED) if name == "digits" else tfds_directory(data_dir)
    prepared = find_prepared(name, directory)
    remedy = f"run `vit-at prepare {name} --data_dir={directory}`"
    if prepared is None:
        check_known(name)
        raise UserError(
            f"data.name is '{name}', which is not prepared in data.dir '{directory}'; {remedy}"
        )
    builder = read_builder(prepared)
    info, features = builder.info, dict(builder.info.features.items())
    if not is_array_record(info):
        raise UserError(
            f"{prepared} is stored as {info.file_format.value}, which only TensorFlow reads; "
            f"to convert it, {remedy}"
        )
    image, label = features.get("image"), features.get("label")
    is_image = isinstance(image, tfds.features.Image) and image.np_dtype != np.float32
    if not (is_image and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(
            f"{info.full_name} is no image classification set: it needs features 'image' and "
            f"'label', and has {', '.join(sorted(features))}; choose another"
        )
    lengths = {key: value.num_examples for key, value in info.splits.items()}
    origin = split_rows(split, lengths, info.full_name)
    indices, used = np.concatenate([rows for _, rows in origin]), [name for name, _ in origin]
    # The image stays encoded: `sources.decode` decodes it, and only the formats that it allows.
    # Other features are not decoded at all.
    example = tfds.features.FeaturesDict({"image": image, "label": label})
    skip = {"image": tfds.decode.SkipDecoding()}
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    records = builder.as_data_source(split, deserialize_method=raw) if len(indices) else []

    def fetch(rows: Sequence[int]) -> list[tuple[bytes, int]]:
        found = [
            example.deserialize_example_np(r, decoders=skip) for r in records.__getitems__(rows)
        ]
        return [(record["image"], record["label"]) for record in found]

    def contents() -> str:  # the images of a version may be stored as PNG or JPEG
        found = [(name, info.splits[name]) for name in used]
        sizes = [(name, about.num_examples, int(about.num_bytes)) for name, about in found]
        return digest(f"{info.full_name} {sizes}")

    def names() -> list[str]:
        if not isinstance(features.get("file_name"), tfds.features.Text):
            raise UserError(
                f"{info.full_name} does not say its images' file names (it has no feature "
                "'file_name'), so --ids can't be used; give its images as folder:PATH"
            )
        logging.info("reading the file names of all %d images of %s", len(indices), split)
        about = tfds.features.FeaturesDict({"label": label, "file_name": features["file_name"]})
        found = (about.deserialize_example_np(records[i]) for i in range(len(indices)))
        return [f"{label.int2str(r['label'])}/{r['file_name'].decode()}" for r in found]

    return Encoded(
        name=f"{info.full_name} {split}",
        class_names=tuple(label.names),
        indices=indices,
        fetch=fetch,
        where=lambda row: f"image {indices[row]} of {info.full_name} {split}",
        names=names,
        origin=origin,
        fingerprint=contents,
        contents=contents,
        source=info.full_name,
    )
