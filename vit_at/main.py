"""Adversarial training from the command line; a second start of the same command resumes.

python -m vit_at.main --config=configs/cifar10_sgd.py [--config.FIELD=VALUE ...] [--workdir=DIR]
"""

import os
import signal
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from vit_at import command_line
from vit_at.config import one_sentence_errors
from vit_at.results import table
from vit_at.train import Diverged, Interrupted, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the recipe, and its variants.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run is kept; default runs/<config name>.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    os.path.join("~", ".cache", "vit_at"),
    "Directory that keeps compiled programs for the next start; '': none.",
)
EXIT_DIVERGED = 3


def main(arguments: Sequence[str]) -> int:
    """Runs; the exit status is 2 for a mistake of the user's, 3 for a diverged run."""
    del arguments
    command_line.quiet_logging()
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_CACHE.value))
    with one_sentence_errors():
        workdir = epath.Path(_WORKDIR.value or os.path.join("runs", _CONFIG.value.name))
        try:
            records = train(_CONFIG.value, workdir)
        except Interrupted as interruption:
            return interruption.exit_status
        except KeyboardInterrupt:  # outside the loop, or the second one
            logging.info("interrupted; the same command goes on from the last checkpoint")
            return 128 + signal.SIGINT
        except Diverged as divergence:
            logging.error("%s", divergence)
            return EXIT_DIVERGED
    print(table(records))
    print(f"results: {workdir / 'results.json'}")
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
