"""Writes runs as one HTML page that needs no network, no scripts and no other files.

    vit-at report runs/NAME                                 # writes runs/NAME/report/index.html
    vit-at report runs/A runs/B --out=page.html
    vit-at report cifar10_convit_128x5_conv --out=page.html # a packaged model, or an export
    vit-at report results/digits_sgd.json --out=table.md    # only the table, as Markdown
    vit-at report runs/NAME-sweep --out=study.json          # a study file

Each WORKDIR is a work directory, a directory of work directories, an export or a name as in
vit_at.load, or a study file.
"""

import argparse
import sys
from collections.abc import Sequence

from vit_at.console import quiet_logging
from vit_at.errors import Parser, one_sentence_errors
from vit_at.reporting.page import write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--out", default="", metavar="FILE", help=".html, .md or .json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at report", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    quiet_logging()
    with one_sentence_errors(options.workdirs[0]):
        print(f"report: {write(options.workdirs, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
