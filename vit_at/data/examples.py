"""``Examples``: labelled images that are read by position, whatever they come from.

``file_name`` names what is kept of them on disk.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

_READ_AT_ONCE = 256  # images
_LONGEST_NAME = 255  # bytes that file systems allow


Origin = Sequence[tuple[str, np.ndarray]]  # (split on disk, positions in it)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images of one size, read by position.

    Attributes:
      name: data set, version and split, such as "cifar10/3.0.2 train[:90%]".
      class_names: by label.
      image_shape: (S, S, C).
      indices: [n] position of each example in its split on disk. Slices, `take` and `hold_out`
        keep these numbers; results name an image by its number.
      origin: (split on disk, positions in it) of everything that was opened.
      source: where these splits lie, see ``backends.Encoded``.
      transform: name of what made the images square, see ``transforms``.
      ids: name and digest of the list that chose the images; '': all of the split.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    indices: np.ndarray
    _rows: np.ndarray  # [n] arguments of _read_rows
    _read_rows: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    origin: Origin = ()
    transform: str = "squash"
    ids: str = ""
    # rows -> labels, without decoding an image; None: by _read_rows.
    _labels_of: Callable[[np.ndarray], np.ndarray] | None = None
    _contents: Callable[[], str] = str  # see ``backends.Encoded``
    source: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def contents(self) -> str:
        """A digest of all images that were opened, also of those that were not taken: of a folder,
        of their classes, names and sizes; of a TFDS data set, of the sizes of its splits; of an
        array, of its pixels. '' of images made in memory.
        """
        return self._contents()

    @property
    def nbytes(self) -> int:
        """Size of all decoded images in bytes."""
        return len(self) * math.prod(self.image_shape)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, S, S, C] uint8 and labels [n] int32 of these positions.

        A UserError names an image that can't be decoded or has no label.
        """
        return self._read_rows(self._rows[indices])

    def labels(self) -> np.ndarray:
        """All labels [n] int32, where possible without decoding an image."""
        parts = np.array_split(self._rows, -(-len(self) // _READ_AT_ONCE))
        of_part = self._labels_of or (lambda rows: self._read_rows(rows)[1])
        return np.concatenate([of_part(part) for part in parts])

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at these positions, in this order; copies no images."""
        return dataclasses.replace(self, indices=self.indices[indices], _rows=self._rows[indices])

    def own_origin(self) -> Origin:
        """``origin`` of these images only, of a set that was opened without a list or a count."""
        parts = np.repeat(np.arange(len(self.origin)), [len(rows) for _, rows in self.origin])
        own = parts[self._rows]
        return [(split, self.indices[own == i]) for i, (split, _) in enumerate(self.origin)]

    def relabelled(self, class_names: Sequence[str]) -> "Examples":
        """The same images with labels that number ``class_names``, which hold all of their own."""
        number = np.array([list(class_names).index(name) for name in self.class_names], np.int32)

        def read_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images, labels = self._read_rows(rows)
            return images, number[labels]

        labels_of = self._labels_of and (lambda rows: number[self._labels_of(rows)])
        changes = {"_read_rows": read_rows, "_labels_of": labels_of}
        return dataclasses.replace(self, class_names=tuple(class_names), **changes)


def file_name(before: str, readable: str, after: str) -> str:
    """The three in a row; ``readable``, if it is too long for a file's name, cut with a digest."""
    content, spare = readable.encode(), _LONGEST_NAME - len((before + after).encode())
    if len(content) > spare:
        digest = f"-{hashlib.sha256(content).hexdigest()[:12]}"
        readable = content[: spare - len(digest)].decode(errors="ignore") + digest
    return f"{before}{readable}{after}"
