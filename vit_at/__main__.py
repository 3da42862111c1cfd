"""``python -m vit_at COMMAND ...``: the same as ``vit-at COMMAND ...``."""

import sys

from vit_at.cli import main

sys.exit(main())
