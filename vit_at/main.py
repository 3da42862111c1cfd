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

from vit_at.console import quiet_logging
from vit_at.distributed import devices, processes
from vit_at.errors import one_sentence_errors
from vit_at.flags import parse_flags
from vit_at.training.loop import Diverged, Interrupted, train
from vit_at.workdir.results import table

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the recipe, and its variants.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run is kept; default runs/<config name>.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    devices.CACHE,
    "Directory that keeps compiled programs for the next start; '': none.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, for several processes outside of a known cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "How many processes; 0: what the TPU pod, Slurm or Kubernetes says."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "This process's number, from 0.")
_WAIT = flags.DEFINE_integer("wait_seconds", 300, "How long to wait for the other processes.")
_REPORT = flags.DEFINE_bool("report", True, "Write WORKDIR/report/index.html at the end.")
EXIT_DIVERGED = 3


def main(arguments: Sequence[str]) -> int:
    """Runs; see docs/reliability.md for the exit status."""
    del arguments
    quiet_logging()
    config, shares = _CONFIG.value, max(1, _NUM_PROCESSES.value)
    micro_batch = config.batch_size // (shares * max(1, config.accumulate_steps))
    devices.configure(micro_batch, config.eval.batch_size // shares, cache=_CACHE.value)
    with one_sentence_errors():
        processes.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, seconds=_WAIT.value
        )
        with processes.shared_exit():
            return _train()


def _train() -> int:
    workdir = epath.Path(_WORKDIR.value or os.path.join("runs", _CONFIG.value.name))
    try:
        records = train(_CONFIG.value, workdir)
    except Interrupted as interruption:
        return interruption.exit_status
    except KeyboardInterrupt:  # outside the loop, or the second one
        if jax.process_count() > 1:
            raise
        logging.info("interrupted; the same command goes on from the last checkpoint")
        return 128 + signal.SIGINT
    except Diverged as divergence:
        logging.error("%s", divergence)
        return EXIT_DIVERGED
    if jax.process_index() == 0:
        print(table(records))
        print(f"results: {workdir / 'results.json'}")
        if _REPORT.value:
            # Imported only here: the start of a run should not wait for matplotlib.
            from vit_at.reporting.page import write_after_training

            if page := write_after_training(workdir):
                print(f"report: {page}")
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
