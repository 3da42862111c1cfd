"""A work directory -> weights for PyTorch, with a description for leaderboards.

    python -m vit_at.export runs/NAME [--checkpoint=best|last] [--output=DIR]

writes ``model.safetensors``, ``model.json`` and a ``README.md`` that says how to load them.
"""

import argparse
import sys
from collections.abc import Sequence

from vit_at.console import quiet_logging
from vit_at.errors import one_sentence_errors
from vit_at.reporting.exported import DESCRIPTION_FILE, export_workdir


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_at.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", help="a directory that python -m vit_at.main has written")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--output", default="", help="directory; default: WORKDIR/export")
    options = parser.parse_args(arguments)
    quiet_logging()
    with one_sentence_errors():
        written = export_workdir(options.workdir, options.checkpoint, options.output)
        print(f"wrote {written} and {written.parent / DESCRIPTION_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
