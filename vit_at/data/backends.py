"""Where encoded images come from: TFDS data sets, image folders, and the packaged digits.

Each `open_*` returns a split as `Encoded`: files or records that are still compressed, by row.
TFDS data are read from their array_record files without TensorFlow; they must have been prepared
(``python -m vit_at.prepare NAME``): opening never downloads, and says at once what is missing.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from vit_at.errors import UserError

PACKAGED = Path(__file__).parent / "packaged"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Encoded(NamedTuple):
    """A split as a backend opens it: encoded images by row, with their labels."""

    name: str
    class_names: tuple[str, ...]
    indices: np.ndarray  # [n] position in the split on disk of each row
    fetch: Callable[[Sequence[int]], list[tuple[bytes, int]]]  # rows -> encoded images, labels
    where: Callable[[int], str]  # row -> what to call it in an error


def split_rows(split: str, lengths: dict[str, int], name: str) -> list[tuple[str, np.ndarray]]:
    """Resolves TFDS's split notation to (split, positions) pairs."""
    infos = {
        key: tfds.core.SplitInfo(name=key, shard_lengths=[length], num_bytes=0)
        for key, length in lengths.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        known = ", ".join(f"{key} ({length})" for key, length in lengths.items())
        raise UserError(
            f"{name} cannot give split {split!r}; it has {known}, and slices read like "
            "'train[:90%]' or 'test[:48]'."
        ) from error
    return [
        (part.splitname, np.arange(lengths[part.splitname])[part.from_ : part.to]) for part in parts
    ]


# --- Image folders ----------------------------------------------------------------------------


def open_folder(root: Path, split: str) -> Encoded:
    """Opens root/<split>/<class>/<image>; labels number the sorted classes of all splits together.

    Images come in the order of a hash of class/file, so that a slice such as test[:48] draws on
    every class, as it does in TFDS; `indices` are positions in the sorted listing.
    """
    if not root.is_dir():
        raise UserError(f"data.name='folder:{root}' is not a directory.")
    splits = {folder: _files(root / folder) for folder in _folders(root)}
    classes = sorted({name for folder in splits for name in _folders(root / folder)})
    if not classes:
        raise UserError(f"{root} has no classes; arrange it as {root}/<split>/<class>/<image>.")
    lengths = {name: len(files) for name, files in splits.items()}
    indices, paths = [], []
    for name, positions in split_rows(split, lengths, str(root)):
        keys = [hashlib.md5(file.encode()).digest() for file in splits[name]]
        chosen = np.array(sorted(range(len(keys)), key=keys.__getitem__), int)[positions]
        indices.append(chosen)
        paths += [root / name / splits[name][i] for i in chosen]
    number = {name: label for label, name in enumerate(classes)}
    return Encoded(
        name=f"folder:{root} {split}",
        class_names=tuple(classes),
        indices=np.concatenate(indices),
        fetch=lambda rows: [(paths[i].read_bytes(), number[paths[i].parent.name]) for i in rows],
        where=lambda row: str(paths[row]),
    )


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(split: Path) -> list[str]:
    """Lists <class>/<image> of a split, sorted."""
    files, left_out = [], 0
    for folder in _folders(split):
        names = os.listdir(split / folder)
        found = sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and n[0] != ".")
        left_out += len(names) - len(found)
        if not found:
            raise UserError(
                f"{split / folder} has no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it."
            )
        files += [f"{folder}/{name}" for name in found]
    if left_out:
        kinds = ", ".join(IMAGE_SUFFIXES)
        logging.warning("%d files of %s are hidden or no %s: left out", left_out, split, kinds)
    return files


# --- TFDS -------------------------------------------------------------------------------------


def tfds_directory(data_dir: str = "") -> epath.Path:
    """Returns data.dir, or $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return epath.Path(chosen).expanduser()


def find_prepared(name: str, directory: epath.PathLike) -> epath.Path | None:
    """Returns the newest prepared version of NAME[/CONFIG][:VERSION] under a TFDS directory.

    A name without its config finds a config that is the only one there; otherwise UserError.
    """
    name, _, version = name.partition(":")
    root = epath.Path(directory) / name
    versions = _versions(root)
    if not versions and root.is_dir() and "/" not in name:
        configs = {path.name: _versions(path) for path in root.iterdir() if path.is_dir()}
        configs = {config: found for config, found in configs.items() if found}
        if len(configs) > 1:
            raise UserError(
                f"data.name={name!r} leaves open which of {', '.join(sorted(configs))} is meant; "
                f"write it as '{name}/{min(configs)}'."
            )
        versions = next(iter(configs.values()), [])
    versions = [path for path in versions if version in ("", path.name)]
    return max(versions, key=lambda path: [int(x) for x in path.name.split(".")], default=None)


def _versions(root: epath.Path) -> list[epath.Path]:
    paths = root.iterdir() if root.is_dir() else ()
    return [
        path
        for path in paths
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").exists()
    ]


def check_known(name: str) -> None:
    """Raises UserError, with the nearest names, if TFDS has no data set or config of this name."""
    base, _, config = name.partition(":")[0].partition("/")
    known = tfds.list_builders(with_community_datasets=False)
    wrong, choices = base, ["digits", *known]
    if base in known:
        wrong, choices = config, list(tfds.builder_cls(base).builder_configs)
    if wrong and wrong not in choices:
        near = difflib.get_close_matches(wrong, choices, n=3, cutoff=0.5)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise UserError(
            f"data.name={name!r}: TFDS knows no {wrong!r}{hint}; name one of its data sets, "
            "'digits', or 'folder:PATH'."
        )


def is_array_record(info: tfds.core.DatasetInfo) -> bool:
    """Tells whether the data lie in the one format that is read without TensorFlow."""
    return tfds.core.FileFormat.ARRAY_RECORD in (info.file_format, *info.alternative_file_formats)


def open_tfds(name: str, data_dir: str, split: str) -> Encoded:
    directory = epath.Path(PACKAGED) if name == "digits" else tfds_directory(data_dir)
    prepared = find_prepared(name, directory)
    remedy = f"run `python -m vit_at.prepare {name} --data_dir={directory}`."
    if prepared is None:
        check_known(name)
        raise UserError(
            f"data.name={name!r} is not prepared in data.dir={str(directory)!r}; {remedy}"
        )
    builder = tfds.builder_from_directory(prepared)
    info, features = builder.info, dict(builder.info.features.items())
    if not is_array_record(info):
        raise UserError(
            f"{prepared} is stored as {info.file_format.value}, which only TensorFlow reads; "
            f"to convert it {remedy}"
        )
    image, label = features.get("image"), features.get("label")
    is_image = isinstance(image, tfds.features.Image) and image.np_dtype != np.float32
    if not (is_image and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(
            f"{info.full_name} is not for image classification: it needs features 'image' and "
            f"'label', and has {', '.join(sorted(features))}."
        )
    lengths = {key: value.num_examples for key, value in info.splits.items()}
    indices = np.concatenate([rows for _, rows in split_rows(split, lengths, info.full_name)])
    # Images stay encoded: `decode` resizes them, and TFDS's own decoding would warn about OpenCV.
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    skip = {key: tfds.decode.SkipDecoding() for key in images}
    records = builder.as_data_source(split, decoders=skip) if len(indices) else []
    return Encoded(
        name=f"{info.full_name} {split}",
        class_names=tuple(label.names),
        indices=indices,
        fetch=lambda rows: [(r["image"], r["label"]) for r in records.__getitems__(rows)],
        where=lambda row: f"Image {indices[row]} of {info.full_name} {split}",
    )
