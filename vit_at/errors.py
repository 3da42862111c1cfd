"""Errors that a user can put right, each one sentence that says what is wrong and what to do."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Something the user can put right; its text is one sentence that says what and how."""


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Ends the program with status 2 and the sentence of a UserError, without a traceback."""
    try:
        yield
    except UserError as error:
        sentence = " ".join(str(error).splitlines())
        sys.stderr.write(f"error: {sentence}\n")  # in one piece, if several processes say it
        sys.exit(2)


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices most like ``word``, or all of a short list, as text."""
    choices = list(choices)

    def likeness(choice):  # to its beginning, as long names are cut short, or its last part
        parts = (choice[: len(word) + 1], choice.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    near = sorted((c for c in choices if likeness(c) > 0.5), key=likeness, reverse=True)
    return ", ".join(near[:count] or choices[:12])
