"""Paths, file systems, addresses and memory: what the boundary of the commands explains."""

import errno
import os

import jax
from bad_input.case import Case

from vit_at.errors import explained_errors

LONG = "n" * 300
TRAIN = ["train", "digits_sgd:smoke", "--no-report"]


def train(workdir: str, says: str, prepare=None) -> Case:
    return Case([*TRAIN, f"--workdir={workdir}"], says, prepare)


def field(assignment: str, says: str, prepare=None) -> Case:
    return Case([*TRAIN, "--workdir=run", f"--config.{assignment}"], says, prepare)


def file(folder):
    (folder / "file").write_text("text")


def loop(folder):
    (folder / "loop").symlink_to("loop")


def latin1(folder):
    (folder / "mine.py").write_bytes(b"# caf\xe9\n")


def explained(error: BaseException, says: str) -> Case:
    """An error that a command can't be made to meet on every machine."""

    def deed(folder):
        with explained_errors():
            raise error

    return Case(deed, f"{says}.*; the traceback for a bug report is in")


def system(number: int, says: str) -> Case:
    return explained(OSError(number, os.strerror(number), "results.json"), says)


CASES = {
    "train below a device": train("/dev/null/x", "/dev/null/x"),
    "train in /proc": train("/proc/x", "/proc/x"),
    "train in a file": train("file", "file", file),
    "train below a file": train("file/run", "file", file),
    "train in a name that is too long": train(LONG, "File name too long"),
    "train in a name with NUL": train("a\0b", "NUL"),
    "train in a loop of links": train("loop/run", "loop", loop),
    "train at an https address": train("https://example.org/run", "https:// .* can't be used"),
    "train in a bucket of S3": train("s3://bucket/run", "at s3://, .* a gs:// address"),
    "evaluate a device": Case(["evaluate", "/dev/null"], "/dev/null"),
    "evaluate a file": Case(["evaluate", "file"], "file", file),
    "evaluate a name that is too long": Case(
        ["evaluate", LONG], "File name too long|no work directory or export 'nnn"
    ),
    "evaluate a name with NUL": Case(["evaluate", "a\0b"], r"no work directory or export .a\\x00b"),
    "evaluate a loop of links": Case(["evaluate", "loop"], "loop", loop),
    "evaluate in a bucket without its library": Case(["evaluate", "s3://bucket/run"], "s3"),
    "evaluate an https address": Case(["evaluate", "https://example.org/run"], "https"),
    "export a file": Case(["export", "file"], "file", file),
    "export a name that is too long": Case(
        ["export", LONG], "File name too long|no work directory or export 'nnn"
    ),
    "export a name with NUL": Case(["export", "a\0b"], r"no work directory or export .a\\x00b"),
    "export an https address": Case(["export", "https://example.org/run"], "https"),
    "report a device": Case(["report", "/dev/null"], "/dev/null"),
    "report a name that is too long": Case(["report", LONG], "File name too long|nnn"),
    "report a name with NUL": Case(["report", "a\0b"], "NUL|is no|a.b"),
    "report a loop of links": Case(["report", "loop"], "loop", loop),
    "a recipe with NUL": Case(["train", "a\0b.py"], "a.b.py"),
    "a recipe with a name that is too long": Case(["train", f"{LONG}.py"], "File name too long"),
    "a recipe that is a folder": Case(
        ["train", "mine.py"], "mine.py", lambda folder: (folder / "mine.py").mkdir()
    ),
    "a work directory that is no UTF-8 name": Case(
        ["train", "digits_sgd:smoke", "--workdir=caf\udce9"], "workdir is 'caf.* not UTF-8; rename"
    ),
    "a recipe that is not UTF-8": Case(["train", "mine.py"], "mine.py", latin1),
    "a recipe that is no UTF-8 name": Case(["train", "caf\udce9.py"], "caf"),
    "weights that are a device": field("model.pretrained=/dev/null", "/dev/null"),
    "weights that are a folder": field("model.pretrained=/proc", "/proc"),
    "weights at an https address": field("model.pretrained=https://example.org/m.pth", "https"),
    "weights with a name that is too long": field(f"model.pretrained={LONG}", "nnn"),
    "images in a file": field("data.name=folder:file", "file", file),
    "images in a device": field("data.name=folder:/dev/null", "/dev/null"),
    "images in a loop of links": field("data.name=folder:loop", "loop", loop),
    "a full disk": system(errno.ENOSPC, "'results.json' .*No space left"),
    "a quota": system(errno.EDQUOT, "quota exceeded"),
    "a read-only file system": system(errno.EROFS, "Read-only file system"),
    "a file that is too large": system(errno.EFBIG, "File too large"),
    "a broken disk": system(errno.EIO, "Input/output error"),
    "too many open files": system(errno.EMFILE, "Too many open files"),
    "a file of another user": system(errno.EACCES, "Permission denied"),
    "no memory": explained(MemoryError(), "memory .* is used up; .*lower batch_size"),
    "no memory on the device": explained(
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "model.remat=True"
    ),
    "a disk that fills under a checkpoint": explained(
        ValueError("RESOURCE_EXHAUSTED: writing 'd/0': No space left on device"), "the disk is full"
    ),
    "no gcsfs": explained(ModuleNotFoundError("gcsfs", name="gcsfs"), "pip install"),
}
