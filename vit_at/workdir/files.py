"""The files of a work directory: read with clear errors, written whole or not at all.

WORKDIR/config.json         the configuration the run was started with, resolved
WORKDIR/parameters.txt      the parameter overview
WORKDIR/checkpoints/        see vit_at.workdir.checkpoint
WORKDIR/metrics.jsonl       and TensorBoard events: see vit_at.training.metrics
WORKDIR/results.json        and per_example.npz: see vit_at.workdir.results
WORKDIR/.training.lock      and .evaluation.lock: held while a process works in it
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_at import config as configuration
from vit_at.errors import UserError

CONFIG_FILE = "config.json"
_REMEDIES = {
    "no space left": "the disk is full: free some space",
    "quota exceeded": "the disk quota is used up: free some space",
    "permission denied": "it may not be written: choose another --workdir",
    "read-only file system": "it may not be written: choose another --workdir",
    "file exists": "a file has its name: choose another --workdir",
    "not a directory": "a file has its name: choose another --workdir",
}


@contextlib.contextmanager
def disk_errors(directory: epath.Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for sign, remedy in _REMEDIES.items():
            if sign in str(error).lower():
                raise UserError(
                    f"{directory} could not be written, as {remedy} and run the same command "
                    "again; it goes on from the last whole checkpoint"
                ) from error
        raise


def check_space(directory: epath.Path, needed: int) -> None:
    """Raises UserError where the disk of a local directory has no room for this many bytes.

    Asked before a checkpoint is begun, so that a full disk holds no half of one.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError:  # not a local directory
        return
    if free < needed:
        raise UserError(
            f"{directory} could not be written, as the disk is full ({free / 2**20:.1f} MiB are "
            f"free, a checkpoint takes {needed / 2**20:.1f}): free some space and run the same "
            "command again; it goes on from the last whole checkpoint"
        )


@contextlib.contextmanager
def locked(workdir: epath.Path, use: str) -> Iterator[None]:
    """Holds a work directory for one use, 'training' or 'evaluation', so that no two disturb it.

    The lock is the operating system's on ``.<use>.lock``: it ends with the process that holds it,
    however that ends. Object stores have no such locks; there this does nothing.

    Raises:
      UserError: another process holds it; the sentence says which.
    """
    if jax.process_index() or is_object(workdir):
        yield
        return
    with open(workdir / f".{use}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by another {use} ({file.read().strip() or 'unknown'}); wait "
                "for its end, or choose another work directory"
            ) from error
        except OSError as error:  # a file system without locks
            logging.warning("%s can't be locked (%s): start it only once", workdir, error.strerror)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes ``config.json``, or checks that the one there is the same.

    Raises:
      UserError: the work directory belongs to another configuration.
    """
    path, text = workdir / CONFIG_FILE, configuration.to_json(config)
    if path.exists():
        stored = configuration.with_added(read_json(path))
        changes = configuration.differences(stored, json.loads(text))
        if changes:
            raise UserError(
                f"the work directory {workdir} holds a run of another configuration "
                f"({'; '.join(changes[:4])}{'; ...' if len(changes) > 4 else ''}); "
                "choose another --workdir, or the same configuration to resume that run"
            )
    elif jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def read_config(workdir: epath.Path) -> ConfigDict:
    """The configuration of a work directory; UserError where there is none."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"{workdir} is no work directory: it has no {CONFIG_FILE}; give one that "
            "'python -m vit_at.main --workdir=...' has written"
        )
    return as_config(read_json(path))


def as_config(values: dict[str, Any]) -> ConfigDict:
    """The locked configuration that JSON values were written from."""
    return ConfigDict(_with_tuples(configuration.with_added(values))).lock()


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or delete it") from error


def is_object(path: epath.Path) -> bool:
    """Whether it lies in an object store, such as gs://, which knows no appending and no locks."""
    return "://" in str(path)


class Rewritten:
    """A text file of an object store: kept in memory, and written whole now and then."""

    def __init__(self, path: epath.Path, seconds: float = 30.0):
        self._path, self._seconds, self._written = path, seconds, time.monotonic()
        self._text = path.read_text() if path.exists() else ""

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        """Writes it if that was last done ``seconds`` ago."""
        if time.monotonic() - self._written >= self._seconds:
            self.close()

    def close(self) -> None:
        """Writes it."""
        self._path.write_text(self._text)
        self._written = time.monotonic()


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    partial = path.parent / f".{path.name}.partial"
    if isinstance(content, bytes):
        partial.write_bytes(content)
    else:
        partial.write_text(content)
    partial.replace(path)
