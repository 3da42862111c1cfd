"""What a case of bad input is; the tables of cases are the other files of this folder.

A table is a dict ``CASES`` of {name: Case}. ``tests/test_bad_input.py`` runs each case in an empty
folder and checks that it ends in one sentence, leaves the folder as it was, and does not hang.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One bad input.

    deed: the arguments of ``vit-at``, or a function of the folder that must raise UserError.
    says: a regular expression that the sentence contains.
    prepare: writes the files that the case needs into the folder.
    corrected: arguments that must work afterwards, in the same folder.
    status: exit status of a command.
    slow: takes more than two seconds.
    """

    deed: list[str] | Callable[[pathlib.Path], Any]
    says: str
    prepare: Callable[[pathlib.Path], Any] | None = None
    corrected: list[str] | None = None
    status: int = 2
    slow: bool = False
