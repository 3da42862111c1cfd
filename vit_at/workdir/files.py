"""The files of a work directory: clear errors on reading, atomic writing.

WORKDIR/config.json         the resolved configuration of the run
WORKDIR/parameters.txt      the parameter overview
WORKDIR/checkpoints/        see vit_at.workdir.checkpoint
WORKDIR/metrics.jsonl       and TensorBoard events: see vit_at.training.metrics
WORKDIR/results.json        and per_example.npz: see vit_at.workdir.results
WORKDIR/.training.lock      and .evaluation.lock: held while a process writes to it
"""

import contextlib
import fcntl
import functools
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
from vit_at import schema
from vit_at.configs import default
from vit_at.errors import UserError
from vit_at.schema import is_remote
from vit_at.workdir.lease import leased

CONFIG_FILE = "config.json"
DESCRIPTION_FILE = "model.json"  # of an export, whose config.json is timm's
_RESTORE = "restore it from a copy, or delete it"
_REMEDIES = {
    "no space left": "the disk is full: free some space",
    "quota exceeded": "the disk quota is used up: free some space",
    "permission denied": "it is not writable: choose another --workdir",
    "read-only file system": "it is not writable: choose another --workdir",
    "file exists": "its path is a file: choose another --workdir",
    "not a directory": "its path is a file: choose another --workdir",
}


@contextlib.contextmanager
def disk_errors(directory: epath.Path) -> Iterator[None]:
    """Turns the error of a full or read-only disk into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for symptom, remedy in _REMEDIES.items():
            if symptom in str(error).lower():
                raise UserError(
                    f"{directory} could not be written, as {remedy} and run the same command "
                    "again to resume from the last checkpoint"
                ) from error
        raise


def check_space(directory: epath.Path, needed: int) -> None:
    """Raises UserError if the disk of a local directory has fewer free bytes than ``needed``.

    Called before a checkpoint is written, so that a full disk never holds a partial one.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError:  # not a local directory
        return
    if free < needed:
        raise UserError(
            f"{directory} could not be written, as the disk is full ({free / 2**20:.1f} MiB are "
            f"free, a checkpoint takes {needed / 2**20:.1f}): free some space and run the same "
            "command again to resume from the last checkpoint"
        )


@contextlib.contextmanager
def locked(workdir: epath.Path, use: str, *, wait: bool = False) -> Iterator[None]:
    """Locks a work directory for one use, 'training' or 'evaluation'.

    The operating system locks ``.<use>.lock`` and releases it when the process ends, however it
    ends. If another process holds the lock, a UserError names it. In a bucket, ``lease`` does this.

    wait: until the other process releases it, in place of the error.
    """
    if jax.process_index():
        yield
        return
    if is_remote(workdir):
        with leased(str(workdir / f".{use}.lease"), use, wait=wait):
            yield
        return
    with open(workdir / f".{use}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = f"another {use} ({file.read().strip() or 'unknown'})"
            if not wait:
                raise UserError(
                    f"{workdir} is in use by {holder}; wait until it ends, or choose another work "
                    "directory"
                ) from error
            logging.info("%s is in use by %s; waiting until it ends", workdir, holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            logging.warning("%s can't be locked (%s): run it only once", workdir, error.strerror)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Creates the directory; UserError if its ``config.json`` is of another configuration."""
    path = workdir / CONFIG_FILE
    if path.exists():
        stored = read_values(path)
        changes = configuration.differences(stored, json.loads(json.dumps(config.to_dict())))
        if changes:
            raise UserError(
                f"the work directory {workdir} holds a run of another configuration "
                f"({'; '.join(changes[:4])}{'; ...' if len(changes) > 4 else ''}); "
                "choose another --workdir, or the same configuration to resume that run"
            )
    elif jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
    """``check_config``; then writes ``config.json``, unless it is there."""
    check_config(workdir, config)
    path = workdir / CONFIG_FILE
    if jax.process_index() == 0 and not path.exists():
        write_atomically(path, json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(workdir: epath.Path) -> ConfigDict:
    """The configuration of a work directory; UserError if there is none."""
    if not is_workdir(workdir):
        found = f"is an export, with a {DESCRIPTION_FILE}"
        if not is_export(workdir):
            found = f"has no {CONFIG_FILE}"
        raise UserError(
            f"{workdir} is no work directory: it {found}; give one that "
            "'vit-at train --workdir=...' has written"
        )
    return _locked(read_values(workdir / CONFIG_FILE))


def is_workdir(directory: epath.Path) -> bool:
    """Whether a directory holds the configuration of a run, and is no export."""
    return (directory / CONFIG_FILE).exists() and not is_export(directory)


def is_export(directory: epath.Path) -> bool:
    """Whether a directory is what ``vit-at export`` has written."""
    return (directory / DESCRIPTION_FILE).exists()


def read_values(path: epath.Path) -> dict[str, Any]:
    """The JSON values of a ``config.json``, with the fields that older files lack."""
    return _completed(schema.read_json(path, dict[str, Any], _RESTORE), path)


def as_config(values: dict[str, Any], path: epath.Path, inside: str = "") -> ConfigDict:
    """The locked configuration of JSON values; path: of their file, inside: where in it."""
    return _locked(_completed(values, path, inside))


def _completed(values: dict[str, Any], path: epath.Path, inside: str = "") -> dict[str, Any]:
    """The values with the fields that older files lack; UserError if one is of a wrong type."""
    checked = schema.check(values, _config_type(), path, _RESTORE, inside=inside)
    return configuration.with_added(checked)


@functools.cache
def _config_type() -> Any:
    return schema.fields_of(default.get_config().to_dict(), configuration.ADDED)


def _locked(values: dict[str, Any]) -> ConfigDict:
    return ConfigDict(_with_tuples(values)).lock()


def _with_tuples(value: Any) -> Any:
    """Turns JSON's lists back into tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


class RemoteFile:
    """A text file in an object store: kept in memory, and rewritten every ``seconds``."""

    def __init__(self, path: epath.Path, seconds: float = 30.0):
        self._path, self._seconds, self._written = path, seconds, time.monotonic()
        self._text = path.read_text() if path.exists() else ""

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        """Writes the file if the last write is ``seconds`` ago."""
        if time.monotonic() - self._written >= self._seconds:
            self.close()

    def close(self) -> None:
        """Writes the file."""
        self._path.write_text(self._text)
        self._written = time.monotonic()


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it; leaves nothing if that fails.

    An object store writes an object whole or not at all.
    """
    content = content if isinstance(content, bytes) else content.encode()
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.parent / f".{path.name}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
