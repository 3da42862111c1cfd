"""Decoded images that are kept: in memory, or for larger sets on disk.

Decoding and resizing costs a core about 1.5 ms a photograph, in every epoch. A copy costs it once:
uint8 images of the size that the model sees, in one array. On disk it is mapped into memory, so
that an image is read when it is used.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from vit_at.data.examples import Examples, file_name
from vit_at.distributed import devices
from vit_at.errors import UserError, in_one_line

IMAGES, LABELS = "images.npy", "labels.npy"


def in_memory(examples: Examples, threads: int = 0) -> Examples:
    """The same examples, decoded once and in parallel into one uint8 array in memory."""
    logging.info("decoding %d images of %s into memory", len(examples), examples.name)
    images = np.empty((len(examples), *examples.image_shape), np.uint8)
    labels = np.empty(len(examples), np.int32)
    _decode_into(images, labels, examples, threads)
    return _of_arrays(examples, images, labels)


def on_disk(examples: Examples, fingerprint: str, root: Path, threads: int = 0) -> Examples:
    """The same examples, read from a decoded copy in ``root``, which the first run writes.

    fingerprint: of the files that they are decoded from, see ``backends.Encoded``; a change makes
      another copy.

    Raises:
      UserError: the copy is damaged, or can't be written.
    """
    directory = root / _name(examples, fingerprint)
    if not directory.exists():
        with _alone(directory):
            if not directory.exists():
                with _written(directory, examples) as arrays:
                    _decode_into(*arrays, examples, threads)
    return _of_arrays(examples, *_read(directory))


def _decode_into(images: np.ndarray, labels: np.ndarray, examples: Examples, threads: int) -> None:
    def fill(start: int) -> None:
        rows = np.arange(start, min(start + 256, len(examples)))
        images[rows], labels[rows] = examples.read(rows)

    with ThreadPoolExecutor(threads or devices.cores()) as pool:
        list(pool.map(fill, range(0, len(examples), 256)))  # raises the first error of a thread


def _of_arrays(examples: Examples, images: np.ndarray, labels: np.ndarray) -> Examples:
    rows = np.arange(len(examples))
    return dataclasses.replace(
        examples,
        _rows=rows,
        _read_rows=lambda rows: (images[rows], labels[rows]),
        _labels_of=labels.__getitem__,
    )


def _name(examples: Examples, fingerprint: str) -> str:
    """Readable, and with a digest of all that decides what the copy holds."""
    about = f"{examples.name} {examples.image_shape} {examples.transform} {examples.ids}"
    digest = hashlib.sha256(f"{about} {fingerprint}".encode())
    digest.update(np.ascontiguousarray(examples.indices, np.int64).tobytes())
    readable = re.sub(r"[^\w.]+", "-", examples.name).strip("-")
    return file_name("", readable, f"-{examples.image_shape[0]}px-{digest.hexdigest()[:12]}")


def _read(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        images = np.load(directory / IMAGES, mmap_mode="r", allow_pickle=False)
        return images, np.load(directory / LABELS, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"the decoded copy {directory} can't be read ({in_one_line(error, 120)}); remove the "
            "directory, so that the next run writes it again"
        ) from error


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits while another process of this machine writes the copy; removes what a killed one left.

    On a file system without locks several processes write the copy, and the first one's stays.
    """
    root, digest = directory.parent, _digest(directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / f".{digest}.lock", os.O_CREAT | os.O_RDONLY, 0o666)
    except OSError as error:
        raise _not_written(root, error) from error
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("another process decodes into %s; waiting for it", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        for left in root.glob(f".part-{digest}-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _digest(directory: Path) -> str:
    """What tells the copy from others, and is short."""
    return directory.name[-12:]


def _not_written(root: Path, error: OSError) -> UserError:
    return UserError(
        f"data.decoded_dir {root} can't be written ({in_one_line(error, 120)}); choose another "
        "directory, or '' for none"
    )


@contextlib.contextmanager
def _written(directory: Path, examples: Examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images and labels to fill; the copy appears as a whole, or not at all."""
    root, needed, count = directory.parent, examples.nbytes, len(examples)
    try:
        if (free := shutil.disk_usage(root).free) < 1.02 * needed:
            raise UserError(
                f"data.decoded_dir {root} has {free / 2**30:.1f} GiB free, but the copy of "
                f"{examples.name} needs {needed / 2**30:.1f}; choose another directory, or '' for "
                "none"
            )
        part = Path(tempfile.mkdtemp(prefix=f".part-{_digest(directory)}-", dir=root))
    except OSError as error:
        raise _not_written(root, error) from error
    try:
        logging.info("decoding %d images of %s once, into %s", count, examples.name, directory)
        shape, copy = (count, *examples.image_shape), part / "copy"
        copy.mkdir()  # with the umask's permissions; mkdtemp's are the owner's alone
        images = np.lib.format.open_memmap(copy / IMAGES, "w+", np.uint8, shape)
        _reserve(copy / IMAGES, root)
        labels = np.empty(count, np.int32)
        yield images, labels
        images.flush()
        np.save(copy / LABELS, labels)
        with contextlib.suppress(OSError):  # another process was faster
            copy.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reserve(path: Path, root: Path) -> None:
    """Takes the file's space on disk: writing to mapped memory that has none ends the process."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        raise _not_written(root, error) from error
