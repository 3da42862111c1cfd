"""Mistakes of a user, each told in one sentence: what is wrong, and what to do."""

import argparse
import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake that the user can correct; its text is one sentence that says what and how."""


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Ends the program with status 2 and the sentence of a UserError, without a traceback."""
    try:
        yield
    except UserError as error:
        _end(str(error))


def _end(message: str) -> NoReturn:
    sentence = " ".join(message.splitlines())
    sys.stderr.write(f"error: {sentence}\n")  # one write, as several processes share a terminal
    sys.exit(2)


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices most like ``word`` as text; if none is, the first twelve."""
    choices = list(choices)

    def likeness(choice):  # to its beginning, as long names are cut short, or its last part
        parts = (choice[: len(word) + 1], re.split("[./]", choice)[-1])
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    near = sorted((c for c in choices if likeness(c) > 0.5), key=likeness, reverse=True)
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
        return options

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one sentence."""
        _end(f"{message}; see {self.prog} --help")
