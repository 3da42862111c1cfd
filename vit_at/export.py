"""Writes the weights of a run for PyTorch, with a description for leaderboards.

    vit-at export runs/NAME [--checkpoint=best|last] [--output=DIR]

The files are ``model.safetensors``, ``model.json`` and a ``README.md`` that says how to load them.
"""

import argparse
import sys
from collections.abc import Sequence

from vit_at.console import quiet_logging
from vit_at.errors import Parser, one_sentence_errors
from vit_at.reporting.exported import export_workdir
from vit_at.workdir.exported import DESCRIPTION_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="a directory that 'vit-at train' has written")
    add("--checkpoint", choices=("best", "last"), default="best")
    add("--output", default="", metavar="DIR", help="default: WORKDIR/export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at export", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    quiet_logging()
    with one_sentence_errors(options.workdir):
        written = export_workdir(options.workdir, options.checkpoint, options.output)
        print(f"wrote {written} and {written.parent / DESCRIPTION_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
