"""Prepares a TFDS data set for training: downloads it, and stores it as array_record.

    python -m vit_at.prepare cifar10
    python -m vit_at.prepare imagenette/320px-v2 --data_dir=/data/tfds
    python -m vit_at.prepare imagenet2012 --manual_dir=/data/downloads

Downloading needs TensorFlow, which training does not: ``pip install 'vit_at[prepare]'``.
"""

import argparse
import sys

from vit_at.data.preparation import prepare
from vit_at.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_at.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="TFDS data set, NAME[/CONFIG][:VERSION]")
    parser.add_argument(
        "--data_dir", default="", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    parser.add_argument(
        "--manual_dir", default="", help="archives you downloaded yourself (ImageNet)"
    )
    flags = parser.parse_args(argv)
    try:
        print(f"Ready in {prepare(flags.name, flags.data_dir, flags.manual_dir)}")
    except UserError as error:
        print(f"vit_at.prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
