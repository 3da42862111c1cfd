"""Adversarial training; a second start of the same command resumes the run.

    vit-at train RECIPE [--config.FIELD=VALUE ...] [--workdir=DIR]
    vit-at train digits_sgd:ard_prm --config.threat.eps=0.1
    vit-at train RECIPE --help               lists every field with its value in this recipe

RECIPE is the name of an installed recipe ('vit-at recipes' lists them) or a file, with variants.
The same command from a checkout: python -m vit_at.main --config=configs/digits_sgd.py:ard_prm
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_at import configs
from vit_at.cli import add_process_arguments, join_processes
from vit_at.configs import default, fields
from vit_at.console import quiet_logging
from vit_at.distributed import devices, processes
from vit_at.errors import Parser, UserError, explained_errors, one_sentence_errors
from vit_at.training.loop import Diverged, Interrupted, train
from vit_at.workdir.results import as_text

EXIT_DIVERGED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; ``--config.FIELD=VALUE`` is read by ``fields.override``."""
    add = parser.add_argument
    add("recipe", nargs="?", default="", metavar="RECIPE", help="such as digits_sgd or mine.py")
    add("--config", default="", metavar="RECIPE", help="the same, as an option")
    add("--workdir", default="", metavar="DIR", help="default: runs/<config name>")
    add(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="WORKDIR/report/index.html",
    )
    add("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases, too; '': not")
    add_process_arguments(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status, see docs/reliability.md."""
    with one_sentence_errors():
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
        workdir = epath.Path(options.workdir or os.path.join("runs", config.name)).expanduser()
    quiet_logging()
    shares = max(1, options.num_processes)
    micro_batch = config.batch_size // (shares * max(1, config.accumulate_steps))
    cache = options.compilation_cache
    with one_sentence_errors(str(workdir)):
        sizes = (micro_batch, config.eval.batch_size // shares)
        devices.configure(*sizes, cache=cache, workdir=str(workdir))
        join_processes(options)
        with processes.shared_exit(), explained_errors(str(workdir)):
            return _train(config, options, workdir)


def _train(config: ConfigDict, options: argparse.Namespace, workdir: epath.Path) -> int:
    try:
        records = train(config, workdir, wandb=options.wandb)
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
        print(as_text(records))
        print(f"results: {workdir / 'results.json'}")
        if options.report:
            # Imported only here: the start of a run should not wait for matplotlib.
            from vit_at.reporting.page import write_after_training

            if page := write_after_training(workdir):
                print(f"report: {page}")
    return 0


def parse(arguments: Sequence[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """The configuration and the other options.

    Raises:
      UserError: a recipe, field or value that can't be used.
      SystemExit: an unknown option (status 2, one sentence), or --help (0).
    """
    known = (f"config.{field}" for field in fields.meanings())
    parser = Parser(prog="vit-at train", description=__doc__, more_options=known, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="options and fields")
    add_arguments(parser)
    overrides = [word for word in arguments if word.startswith(fields.FLAG)]
    options = parser.parse_args([word for word in arguments if word not in overrides])
    if options.recipe and options.config:
        raise UserError(f"'{options.recipe}' is no flag; write --config.FIELD=VALUE to set a field")
    recipe = options.recipe or options.config
    if not (recipe or options.help):
        raise UserError(
            "no recipe is given; name one, such as 'vit-at train digits_sgd' or "
            "--config=configs/digits_sgd.py; 'vit-at recipes' lists them"
        )
    config = configs.load(recipe) if recipe else default.get_config()
    config = fields.override(config, overrides)
    if options.help:
        print(f"{parser.format_help()}\n{fields.describe(config)}")
        sys.exit(0)
    return config, options


if __name__ == "__main__":
    sys.exit(main())
