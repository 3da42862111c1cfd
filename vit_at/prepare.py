"""Prepares a TFDS data set for training: downloads it, and stores it as array_record.

    vit-at prepare cifar10
    vit-at prepare imagenette/320px-v2 --data_dir=/data/tfds
    vit-at prepare imagenet2012 --manual_dir=/data/downloads

Downloading needs TensorFlow, which training does not: ``pip install 'vit_at[prepare]'``.
"""

import argparse
import sys
from collections.abc import Sequence

from vit_at.data.preparation import prepare
from vit_at.errors import Parser, one_sentence_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("name", metavar="NAME", help="TFDS data set, NAME[/CONFIG][:VERSION]")
    add("--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    add("--manual_dir", default="", help="archives you downloaded yourself (ImageNet)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares; returns the exit status, 2 for a mistake of the user's."""
    parser = Parser(prog="vit-at prepare", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    with one_sentence_errors():
        print(f"Ready in {prepare(options.name, options.data_dir, options.manual_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
