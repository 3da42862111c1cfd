"""Work directories -> one HTML page that needs nothing else: no network, no scripts, no files.

    python -m vit_at.report runs/NAME                    # writes runs/NAME/report/index.html
    python -m vit_at.report runs/A runs/B --out=page.html
    python -m vit_at.report results/digits_sgd --out=table.md    # only the table, as Markdown

A directory that is no work directory stands for those right inside it.
"""

import argparse
import sys
from collections.abc import Sequence

from vit_at.console import quiet_logging
from vit_at.errors import one_sentence_errors
from vit_at.reporting.page import write


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_at.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--out", default="", help="file: .html, or .md for the table alone")
    options = parser.parse_args(arguments)
    quiet_logging()
    with one_sentence_errors():
        print(f"report: {write(options.workdirs, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
