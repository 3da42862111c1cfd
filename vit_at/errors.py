"""Mistakes of a user, each told in one sentence: what is wrong, and what to do."""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake that the user can correct; its text is one sentence that says what and how."""


_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_OUT_OF_MEMORY = (
    "the memory of the device or of this machine is used up; for training lower batch_size, raise "
    "accumulate_steps, set model.remat=True, or sharding=fsdp on several devices; for an "
    "evaluation lower eval.batch_size (--batch_size)"
)
_BUCKET_LIBRARIES = {
    "gcsfs": "gs:// addresses need the library gcsfs: pip install 'vit_at[gcs]'",
    "s3fs": "s3:// addresses need the library s3fs: pip install s3fs",
    "fsspec": "addresses with :// need the library fsspec: pip install 'vit_at[gcs]'",
}


@contextlib.contextmanager
def one_sentence_errors(workdir: str = "") -> Iterator[None]:
    """The boundary of every command: ends the program with a status and one sentence.

    Status 2 for a UserError and what ``explained_errors`` makes one, 130 for Ctrl-C, and 141 if
    nobody reads the output. Any other exception is a bug and passes, with its traceback.
    """
    try:
        with explained_errors(workdir):
            yield
    except UserError as error:
        _end(str(error))
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _end("interrupted; the same command starts again", 128 + signal.SIGINT)


@contextlib.contextmanager
def explained_errors(workdir: str = "") -> Iterator[None]:
    """Turns errors of disk, memory and missing libraries into UserErrors.

    The traceback is written to ``WORKDIR/traceback.txt``, or to a temporary file if there is no
    such directory.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        if not (sentence := _explanation(error)):
            raise
        where = _write_traceback(workdir, "".join(traceback.format_exception(error)))
        raise UserError(f"{sentence}; the traceback for a bug report is in {where}") from error


def _explanation(error: Exception) -> str:
    """One sentence for an error that the user or the machine causes; '' for a bug."""
    text = str(error)
    if isinstance(error, OSError):
        file = f"{error.filename!r} " if error.filename else ""
        return (
            f"{file}could not be read or written ({error.strerror or text or repr(error)}); "
            "check the path, its permissions and the disk, then run the same command again"
        ).lstrip()
    if any(words in text for words in _DISK_FULL):  # TensorStore: RESOURCE_EXHAUSTED, too
        return f"the disk is full ({text.splitlines()[0][:200]}); make room, then run it again"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return _OUT_OF_MEMORY
    if isinstance(error, ImportError) and error.name in _BUCKET_LIBRARIES:
        return _BUCKET_LIBRARIES[error.name]
    for library, remedy in _BUCKET_LIBRARIES.items():
        if isinstance(error, (ImportError, ValueError)) and f"install {library}" in text.lower():
            return remedy
    if isinstance(error, ValueError) and "embedded null" in text:  # byte or character
        return "a path contains the character NUL, which no file system allows; remove it"
    if isinstance(error, RuntimeError) and "determine home directory" in text:
        return "a path begins with ~ and a name that is no user of this machine; write it in full"
    if isinstance(error, UnicodeError):
        return f"a name or file is not valid UTF-8 ({error}); rename or convert it"
    if isinstance(error, KeyError) and (scheme := re.fullmatch(r"'(\w+://)'", text)):
        return f"{scheme[1]} addresses can't be used; give a local path or a gs:// address"
    return ""


def _write_traceback(workdir: str, text: str) -> str:
    """Writes the file; returns its path."""
    if os.path.isdir(workdir):
        with contextlib.suppress(OSError):
            path = os.path.join(workdir, "traceback.txt")
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
    try:
        descriptor, path = tempfile.mkstemp(prefix="vit_at-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return path
    except OSError:
        return "no file, as none can be written"


def _end(message: str, status: int = 2) -> NoReturn:
    sentence = " ".join(message.splitlines())
    sentence = sentence.encode(errors="backslashreplace").decode()
    sys.stderr.write(f"error: {sentence}\n")  # one write, as several processes share a terminal
    sys.exit(status)


def in_one_line(error: Exception, length: int | None = None) -> str:
    """What an error says, on one line of at most ``length`` characters; its type if it is mute."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices most like ``word`` as text; if none is, the first twelve."""
    choices = list(choices)

    def likeness(choice):  # to its beginning, as long names are cut short, or its last part
        parts = (choice[: len(word) + 1], re.split("[./]", choice)[-1])
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    near = [choice for choice in choices if likeness(choice) > 0.5]
    near.sort(key=lambda choice: (-likeness(choice), len(choice)))
    return ", ".join(near[:count] or choices[:12])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses abbreviations, and ends a mistake with one sentence.

    more_options: names that the caller parses itself, for the suggestions after a typo.
    """

    def __init__(self, *, more_options: Iterable[str] = (), **options: Any):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=as_written, **options)
        self._more_options = tuple(more_options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The options; unlike argparse's, names the nearest option to an unknown one."""
        options, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if not word.startswith("-"):
                self.error(f"'{word}' is no flag; write options as --NAME=VALUE")
            name = word.lstrip("-").partition("=")[0]
            known = [*self._option_string_actions, *(f"--{n}" for n in self._more_options)]
            near = nearest(name, (option[2:] for option in known if option.startswith("--")))
            suggestions = ", ".join(f"--{option}" for option in near.split(", "))
            self.error(f"option '{name}' is unknown; the nearest are {suggestions}")
        for name, given in vars(options).items():
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                    self.error(f"{name} is {value!r}, which is not UTF-8; rename the file")
        return options

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one sentence."""
        _end(f"{message}; see {self.prog} --help")
