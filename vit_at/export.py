"""Writes the weights of a run for PyTorch, with a description for leaderboards.

    vit-at export runs/NAME [--checkpoint=best|last] [--output=DIR] [--images=N] [--stablehlo]

The folder holds ``model.safetensors``, ``model.json``, ``load.py``, timm's ``config.json``, and a
``README.md`` that says how to load them. docs/export.md shows what can be done with it.
"""

import argparse
import sys
from collections.abc import Sequence

from vit_at.config import CHECKPOINTS
from vit_at.console import quiet_logging
from vit_at.errors import Parser, one_sentence_errors
from vit_at.reporting.exported import export_workdir
from vit_at.workdir.files import DESCRIPTION_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("source", metavar="WORKDIR", help="of 'vit-at train', or a name as in vit_at.load")
    add("--checkpoint", choices=CHECKPOINTS, default="", help="default: the one its run tests")
    add("--output", default="", metavar="DIR", help="default: WORKDIR/export")
    add("--images", type=int, default=0, metavar="N", help="add the first N test images")
    add("--data_dir", default="", help="of the images: TFDS, or the one that holds folder:NAME")
    add("--stablehlo", action="store_true", help="add the classifier as a program of jax.export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at export", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    quiet_logging()
    with one_sentence_errors(options.source):
        written = export_workdir(
            options.source,
            options.checkpoint,
            options.output,
            images=options.images,
            data_dir=options.data_dir,
            stablehlo=options.stablehlo,
        )
        print(f"wrote {written} and {written.parent / DESCRIPTION_FILE}; load.py there loads them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
