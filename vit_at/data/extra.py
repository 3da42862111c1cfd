"""Extra training images, such as generated ones, that every batch holds a fixed share of.

Extra      a set, and how many of its images a batch holds
open_npz   images and labels of an .npz file, which stay on disk
joined     two sets as one

Rebuffi et al. 2021 (arXiv 2103.01946) and Wang et al. 2023 (arXiv 2302.04638) train on 70 to 80 %
of images that a diffusion model generated, with the labels of a classifier. Their files hold 1 to
50 million images as plain arrays ``image`` [N, H, W, C] uint8 and ``label`` [N].
"""

import dataclasses
import pathlib
import zipfile
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from vit_at.data.examples import Examples
from vit_at.errors import UserError, in_one_line

PREFIX = "npz:"
_LOCAL_HEADER = 30  # bytes before the name of a member of a zip archive


class Extra(NamedTuple):
    """The extra set, and the number of its images in every batch."""

    examples: Examples
    images: int


def open_npz(path: pathlib.Path, like: Examples) -> Examples:
    """The images of an uncompressed .npz file, mapped into memory and read when they are used.

    like: the set that they are mixed with; image size, channels and classes must be the same.

    Raises:
      UserError: the file is missing, compressed or damaged, or its arrays do not fit.
    """
    images = _mapped(path, "image")
    labels = np.asarray(_mapped(path, "label"))
    if images.dtype != np.uint8 or images.shape[1:] != like.image_shape:
        raise UserError(
            f"{path} holds images {images.dtype} {images.shape[1:]}; they must be uint8 "
            f"{like.image_shape}, as those of {like.name}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path} holds labels {labels.dtype} {labels.shape}; they must be one whole number for "
            f"each of the {len(images)} images"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= like.num_classes:
        found = f"from {labels.min()} to {labels.max()}" if len(labels) else "none"
        raise UserError(
            f"{path} has labels {found}; they must be from 0 to {like.num_classes - 1}, the "
            f"classes of {like.name}"
        )
    rows = np.arange(len(images))

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(images[rows]), labels[rows].astype(np.int32)

    return Examples(f"{PREFIX}{path}", like.class_names, like.image_shape, rows, rows, read)


def _mapped(path: pathlib.Path, name: str) -> np.ndarray:
    """An array of the archive, read-only and mapped into memory; nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed; store it by numpy.savez")
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER)
            lengths = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            file.seek(member.header_offset + _LOCAL_HEADER + sum(lengths))
            shape, dtype = _array_header(file)
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except Exception as error:  # zipfile and NumPy raise many
        raise UserError(
            f"the array '{name}' of {path} can't be read ({in_one_line(error, 120)}); give an "
            "uncompressed .npz file with the arrays image [N, H, W, C] uint8 and label [N]"
        ) from error


def _array_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an .npy file in C order; the file is left where the values begin."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, fortran, dtype = readers[npy.read_magic(file)](file)
    if fortran or dtype.hasobject:
        raise ValueError("its values must be plain numbers in C order")
    return shape, dtype


def joined(first: Examples, second: Examples) -> Examples:
    """Both sets as one: positions from ``len(first)`` on are those of the second."""

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(rows), *first.image_shape), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for examples, mine, offset in (
            (first, rows < len(first), 0),
            (second, rows >= len(first), len(first)),
        ):
            if mine.any():
                images[mine], labels[mine] = examples.read(rows[mine] - offset)
        return images, labels

    rows = np.arange(len(first) + len(second))
    name = f"{first.name} and {second.name}"
    changes = {"indices": rows, "_rows": rows, "_read_rows": read, "_labels_of": None}
    return dataclasses.replace(first, name=name, **changes)
