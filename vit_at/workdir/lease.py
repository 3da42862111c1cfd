"""A lock for a work directory in a bucket: an object that its holder keeps rewriting.

An object store has no locks, but it can create an object only if there is none. Whoever finds one
watches it: if it changes, its holder lives; if it does not for ``STALE`` seconds, the holder has
died, and the lease is taken over. No clocks are compared. A process that died on this machine is
known at once.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging

from vit_at.errors import UserError, in_one_line

BEAT, STALE = 10.0, 45.0  # seconds


@contextlib.contextmanager
def leased(path: str, use: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the object ``path`` while the body runs.

    use: 'training' or 'evaluation'; for the message. wait: until another process releases it.

    Raises:
      UserError: another process holds it.
    """
    import fsspec  # comes with the bucket's library

    store, place = fsspec.core.url_to_fs(path)
    lease = _Lease(store, place)
    lease.acquire(use, wait)
    ended = threading.Event()
    beating = threading.Thread(target=lease.beat, args=(ended,), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        lease.release()


class _Lease:
    def __init__(self, store: Any, place: str):
        self._store, self._place = store, place
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._id, self._count = uuid.uuid4().hex, 0

    def _content(self) -> bytes:
        self._count += 1
        known = {"owner": self._owner, "id": self._id, "count": self._count}
        return json.dumps(known | {"pid": os.getpid(), "machine": _machine()}).encode()

    def _read(self) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self._store.cat_file(self._place)
        return None

    def _created(self) -> bool:
        directory = self._place.rpartition("/")[0]
        try:
            self._store.pipe_file(self._place, self._content(), mode="create")
        except FileExistsError:
            return False
        except FileNotFoundError as error:  # an object needs no directory, but a bucket
            bucket = directory.partition("/")[0]
            raise UserError(
                f"the bucket '{bucket}' does not exist: create it, or correct the work directory"
            ) from error
        except OSError as error:
            raise UserError(
                f"{directory} can't be written ({in_one_line(error, 200)}): check this machine's "
                "credentials and the bucket's permissions, or choose another work directory"
            ) from error
        return True

    def acquire(self, use: str, wait: bool) -> None:
        """Creates the object; takes over a stale one."""
        while not self._created():
            found = self._read()
            if found is None:  # released just now
                continue
            holder = _known(found)
            owner = holder.get("owner", "unknown")
            if not _died_here(holder) and self._changes(found, owner):
                if wait:
                    continue
                raise UserError(
                    f"{self._place.rpartition('/')[0]} is in use by another {use} ({owner}); wait "
                    "until it ends, or choose another work directory"
                )
            if self._read() == found:
                with contextlib.suppress(FileNotFoundError):
                    self._store.rm_file(self._place)

    def _changes(self, content: bytes, owner: str) -> bool:
        logging.info("the directory was in use by %s; waiting whether it still is", owner)
        deadline = time.monotonic() + STALE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT / 4))
            now = self._read()
            if now != content:
                return now is not None
        return False

    def beat(self, ended: threading.Event) -> None:
        """Rewrites the object until ``ended`` is set; a failure is left to the next beat.

        If another process has taken the object over, as this one did not answer, this one ends.
        """
        while not ended.wait(BEAT):
            with contextlib.suppress(Exception):
                holder = _known(self._read() or b"")
                if holder.get("id", self._id) != self._id:
                    logging.error(
                        "%s was taken over by %s while this process did not answer; it ends",
                        self._place.rpartition("/")[0],
                        holder.get("owner", "unknown"),
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._store.pipe_file(self._place, self._content())

    def release(self) -> None:
        """Deletes the object if it is still ours."""
        with contextlib.suppress(Exception):
            if _known(self._read() or b"").get("id") == self._id:
                self._store.rm_file(self._place)


def _machine() -> str:
    """Which processes share our process ids: '' if that can't be known."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether the holder of a lease was a process of this machine that is gone."""
    if not _machine() or holder.get("machine") != _machine():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except (KeyError, ValueError, PermissionError):
        return False
    except ProcessLookupError:
        return True
    return False


def _known(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing if it can't be read."""
    try:
        return dict(json.loads(content))
    except (TypeError, ValueError):
        return {}
