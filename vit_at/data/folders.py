"""Opens image folders and arrays of images, each as ``backends.Encoded``."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from vit_at.data.backends import Encoded, check_regular, digest, split_rows
from vit_at.errors import UserError, in_one_line

SEVERITIES = 5  # of each corruption in CIFAR-10-C
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def open_folder(
    root: Path, split: str, *, used: Sequence[str] = (), stratified: bool = False
) -> Encoded:
    """Opens root/<split>/<class>/<image>; labels number the sorted classes of the splits in use.

    These are ``split`` and those of ``used`` that are there, so that training and test images have
    the same numbers, and other folders, such as Kaggle's test/unknown, add no class.

    Images are ordered by a hash of class/file, so a slice such as test[:48] holds every class, as
    in TFDS; where stratified, in proportion to its size. `indices` are positions in the sorted
    listing.
    """
    if not root.is_dir():
        raise UserError(
            f"data.name is 'folder:{root}', which is no directory; correct the path, or give the "
            "directory that holds it as data.dir (--data_dir)"
        )
    splits = {folder: _files(root / folder) for folder in folders(root)}
    if not any(splits.values()):
        raise UserError(f"{root} has no classes; arrange it as {root}/<split>/<class>/<image>")
    lengths = {name: len(files) for name, files in splits.items()}
    indices, paths = [], []
    parts = split_rows(split, lengths, str(root))
    # In TFDS's notation: 'train[:80%]+val' uses train and val.
    named = {part.partition("[")[0].strip() for name in used for part in name.split("+")}
    in_use = (named & splits.keys()).union(name for name, _ in parts)
    classes = sorted({name for folder in in_use for name in folders(root / folder)})
    for name, positions in parts:
        keys = [hashlib.md5(file.encode()).digest() for file in splits[name]]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), int)
        if stratified:
            labels = np.array([splits[name][i].partition("/")[0] for i in order])
            order = order[in_proportion(labels)]
        indices.append(order[positions])
        paths += [root / name / splits[name][i] for i in order[positions]]
    number = {name: label for label, name in enumerate(classes)}
    return Encoded(
        name=f"folder:{root} {split}",
        class_names=tuple(classes),
        indices=np.concatenate(indices),
        fetch=lambda rows: [(paths[i].read_bytes(), number[paths[i].parent.name]) for i in rows],
        where=lambda row: str(paths[row]),
        names=lambda: [f"{path.parent.name}/{path.name}" for path in paths],
        origin=[(name, rows) for (name, _), rows in zip(parts, indices, strict=True)],
        fingerprint=lambda: _fingerprint(paths, classes),
        contents=lambda: digest("\n".join(map(_named_size, paths))),
        source=str(root.resolve()),
    )


def in_proportion(labels: np.ndarray) -> np.ndarray:
    """An order of labels in which each slice has every class in proportion, to within an image.

    The k-th of a class's n images comes at (k + 1/2) / n; those of one class keep their order.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_class, starts = np.argsort(classes, kind="stable"), np.cumsum(counts) - counts
    rank = np.empty(len(labels))
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.argsort((rank + 0.5) / counts[classes], kind="stable")


def open_npy(path: Path, split: str) -> Encoded:
    """Opens an array of images, such as ``brightness.npy`` of CIFAR-10-C, beside its labels.

    The file holds [N, S, S, 3] or [N, S, S] uint8 and stays on disk, labels.npy beside it [N]. Its
    splits are ``test``, the whole, and ``severity1`` to ``severity5``, its fifths in order, as in
    CIFAR-10-C.

    Raises:
      UserError: a file is missing or no array of this kind.
    """
    beside = path.parent / "labels.npy"
    images, labels = _read_npy(path, "uint8", (3, 4)), _read_npy(beside, "", (1,))
    count = len(images)
    if len(labels) != count or not count or labels.min() < 0:
        raise UserError(
            f"{path} has {count} images and {beside} {len(labels)} labels; give each image a label "
            "of 0 or more"
        )
    splits = {"test": np.arange(count)}
    if count % SEVERITIES == 0:
        parts = np.split(np.arange(count), SEVERITIES)
        splits |= {f"severity{i + 1}": part for i, part in enumerate(parts)}
    parts = split_rows(split, {name: len(rows) for name, rows in splits.items()}, str(path))
    indices = np.concatenate([splits[name][rows] for name, rows in parts])

    def fetch(rows: Sequence[int]) -> list[tuple[bytes, int]]:
        return [(_as_bmp(images[indices[i]]), int(labels[indices[i]])) for i in rows]

    return Encoded(
        name=f"npy:{path} {split}",
        class_names=tuple(map(str, range(int(labels.max()) + 1))),
        indices=indices,
        fetch=fetch,
        where=lambda row: f"image {indices[row]} of {path}",
        names=lambda: [f"{labels[i]}/{i}" for i in indices],
        origin=[("test", splits[name][rows]) for name, rows in parts],
        fingerprint=lambda: _fingerprint([path, beside]),
        contents=lambda: _digest_of_rows(images, labels, indices),
        source=str(path.resolve()),
    )


def _fingerprint(paths: Sequence[Path], classes: Sequence[str] = ()) -> str:
    """A digest of names, sizes and times of modification, and of the classes that labels number."""
    found = hashlib.sha256("\n".join(classes).encode())
    for path in paths:
        about = path.stat()
        found.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _named_size(path: Path) -> str:
    return f"{path.parent.name}/{path.name} {path.stat().st_size}"


def _digest_of_rows(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> str:
    """Of the pixels: another array of the same shape has the same size."""
    found = hashlib.sha256()
    for some in np.array_split(rows, -(-len(rows) // 1024)):
        found.update(np.ascontiguousarray(images[some]))
    return digest(f"{found.hexdigest()} {labels[rows].tolist()}")


def _read_npy(path: Path, dtype: str, dimensions: tuple[int, ...]) -> np.ndarray:
    """The array of a file, which stays on disk; dtype '': whole numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = in_one_line(error, 120)
        raise UserError(
            f"{path} can't be read as an .npy file ({reason}); correct the path, or restore it"
        ) from error
    kind = array.dtype == dtype if dtype else array.dtype.kind in "iu"
    colour = array.ndim < 4 or array.shape[-1] == 3
    if not (isinstance(array, np.memmap) and kind and array.ndim in dimensions and colour):
        raise UserError(
            f"{path} holds {array.dtype}{list(array.shape)}; images must be uint8 [N, S, S, 3] or "
            "[N, S, S] and labels integers [N]"
        )
    return array


def _as_bmp(pixels: np.ndarray) -> bytes:
    """An image file that holds exactly these pixels."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "BMP")
    return content.getvalue()


def folders(path: Path) -> list[str]:
    """The sorted names of the visible folders in a directory."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(split: Path) -> list[str]:
    """The sorted <class>/<image> of a split."""
    files, left_out, kinds = [], 0, ", ".join(IMAGE_SUFFIXES)
    for folder in folders(split):
        with os.scandir(split / folder) as opened:
            entries = list(opened)
        named = [e for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES) and e.name[0] != "."]
        check_regular(named)
        found = sorted(entry.name for entry in named)
        left_out += len(entries) - len(found)
        if not found:
            raise UserError(f"{split / folder} has no images ({kinds}); fill or remove it")
        files += [f"{folder}/{name}" for name in found]
    if left_out:
        logging.warning("%d files of %s are left out: hidden, or no %s", left_out, split, kinds)
    return files
