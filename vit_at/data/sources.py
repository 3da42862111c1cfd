"""Random-access labelled images: TFDS data sets, image folders, and the packaged digits.

`load` turns a name into `Examples`, whose `read(indices)` decodes exactly the images asked for, as
uint8 arrays of one size. That random access is what lets the order of training be a pure function
of (seed, step): nothing has to be shuffled through a buffer, and resuming costs nothing.

An image is converted to the wanted channels and then squashed to the square with PIL's antialiased
bilinear filter, which is what torchvision's ``Resize((S, S))`` does to a PIL image.
"""

import dataclasses
import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from vit_at.data import backends
from vit_at.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images of one size, read by position.

    Attributes:
      name: data set, version and split, such as "cifar10/3.0.2 train[:90%]".
      class_names: one name a class; a label indexes it.
      image_shape: (S, S, C).
      indices: [n] position of each example in its split on disk, whatever slices, `take` or
        `hold_out` have selected since: the number by which results name an image.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    indices: np.ndarray
    _rows: np.ndarray  # [n] positions that _read_rows understands
    _read_rows: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        return len(self) * math.prod(self.image_shape)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images [n, S, S, C] uint8 and labels [n] int32 of these positions, decoded.

        Raises UserError, naming the image, if one cannot be decoded or has no label.
        """
        return self._read_rows(self._rows[indices])

    def take(self, indices: np.ndarray) -> "Examples":
        """Returns a view of these positions, in this order."""
        return dataclasses.replace(self, indices=self.indices[indices], _rows=self._rows[indices])


def load(data: ConfigDict, split: str, *, threads: int = 0) -> Examples:
    """Opens a split of the data set that `data` (config.data) names; cached if small enough.

    Args:
      data: reads name, dir, image_size, mean (its length is the number of channels), cache_gib.
      split: such as "train", "train[:90%]" or "test[:48]" (TFDS's notation, for folders too).
      threads: that decode when the set is cached; 0: one per core.

    Raises:
      UserError: unknown or unprepared data set, unknown or empty split, or no images and labels.
    """
    if data.name.startswith("folder:"):
        encoded = backends.open_folder(Path(data.name.removeprefix("folder:")).expanduser(), split)
    else:
        encoded = backends.open_tfds(data.name, data.dir, split)
    if not len(encoded.indices):
        raise UserError(f"Split {split!r} of {encoded.name} selects no examples; widen its slice.")
    shape = (data.image_size, data.image_size, len(data.mean))
    examples = Examples(
        name=encoded.name,
        class_names=encoded.class_names,
        image_shape=shape,
        indices=encoded.indices,
        _rows=np.arange(len(encoded.indices)),
        _read_rows=lambda rows: _decode_rows(encoded, rows, shape),
    )
    return cached(examples, threads) if examples.nbytes <= data.cache_gib * 2**30 else examples


def cached(examples: Examples, threads: int = 0) -> Examples:
    """Decodes everything once, in parallel, into one uint8 array that all later reads index."""
    n = len(examples)
    logging.info("Decoding %d images of %s into memory.", n, examples.name)
    images = np.empty((n, *examples.image_shape), np.uint8)
    labels = np.empty(n, np.int32)

    def fill(start: int) -> None:
        rows = np.arange(start, min(start + 256, n))
        images[rows], labels[rows] = examples.read(rows)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(fill, range(0, n, 256)))  # raises a reader's error and drops the rest
    return dataclasses.replace(
        examples, _rows=np.arange(n), _read_rows=lambda rows: (images[rows], labels[rows])
    )


def hold_out(examples: Examples, n: int, seed: int) -> tuple[Examples, Examples | None]:
    """Splits off n random examples, the same ones for a seed; n = 0 gives (examples, None)."""
    if not 0 <= n < len(examples):
        raise UserError(
            f"data.validation_examples={n} must be at least 0 and less than the {len(examples)} "
            f"examples of {examples.name}."
        )
    if n == 0:
        return examples, None
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))
    return examples.take(np.sort(shuffled[n:])), examples.take(np.sort(shuffled[:n]))


# --- Decoding ---------------------------------------------------------------------------------


def decode(encoded: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes one image file to uint8 [S, S, C]: converted to C channels, then squashed."""
    size, _, channels = image_shape
    with Image.open(io.BytesIO(encoded)) as opened:
        image = _convert(opened, {1: "L", 3: "RGB"}[channels])
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_shape)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255 instead of scaling
        values = np.clip(np.asarray(image), 0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way
    return image.convert(mode)


def _decode_rows(
    encoded: backends.Encoded, rows: np.ndarray, image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(rows), *image_shape), np.uint8)
    labels = np.empty(len(rows), np.int32)
    try:
        fetched = encoded.fetch(rows.tolist())
    except (OSError, RuntimeError) as error:  # RuntimeError: array_record's
        raise UserError(f"{encoded.name} cannot be read ({error}); restore the file.") from error
    for i, (row, (content, label)) in enumerate(zip(rows, fetched, strict=True)):
        if not 0 <= label < len(encoded.class_names):
            raise UserError(f"{encoded.where(row)} has no label ({label}); choose another split.")
        try:
            images[i] = decode(content, image_shape)
        except Exception as error:  # PIL raises many kinds, SyntaxError and struct.error among them
            raise UserError(
                f"{encoded.where(row)} cannot be decoded ({error}); repair or remove it."
            ) from error
        labels[i] = label
    return images, labels
