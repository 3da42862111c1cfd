"""Adversarial training; a second start of the same command resumes the run.

    vit-at train RECIPE [--config.FIELD=VALUE ...] [--workdir=DIR]
    vit-at train digits_sgd:ard_prm --config.threat.eps=0.1
    vit-at train RECIPE --help               lists every field with its value in this recipe

RECIPE is the name of an installed recipe ('vit-at recipes' lists them) or a file, with variants.
The same command from a checkout: python -m vit_at.main --config=configs/digits_sgd.py:ard_prm
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

import jax
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from vit_at import configs
from vit_at.cli import add_process_arguments, join_processes
from vit_at.config import field_names, get
from vit_at.configs import default
from vit_at.console import quiet_logging
from vit_at.distributed import devices, processes
from vit_at.errors import Parser, UserError, nearest, one_sentence_errors
from vit_at.training.loop import Diverged, Interrupted, train
from vit_at.workdir.results import table

EXIT_DIVERGED = 3
_OVERRIDE = "--config."
_FRACTION = re.compile(r"(--config\.[^=]+=)(\d+\.?\d*)/(\d+\.?\d*)$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; ``--config.FIELD=VALUE`` is read by ``override``."""
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
    add_process_arguments(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status, see docs/reliability.md."""
    with one_sentence_errors():
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()
    shares = max(1, options.num_processes)
    micro_batch = config.batch_size // (shares * max(1, config.accumulate_steps))
    cache = options.compilation_cache
    devices.set_up(micro_batch, config.eval.batch_size // shares, cache=cache)
    with one_sentence_errors():
        join_processes(options)
        with processes.together():
            return _train(config, options)


def _train(config: ConfigDict, options: argparse.Namespace) -> int:
    workdir = epath.Path(options.workdir or os.path.join("runs", config.name))
    try:
        records = train(config, workdir)
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
        if options.report:
            # Imported only here: the start of a run should not wait for matplotlib.
            from vit_at.reporting.page import write_after_training

            if page := write_after_training(workdir):
                print(f"report: {page}")
    return 0


# --- The command line -------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """The configuration and the other options.

    Raises:
      UserError: a recipe, field or value that can't be used.
      SystemExit: an unknown option (status 2, one sentence), or --help (0).
    """
    fields = (f"config.{field}" for field in configs.meanings())
    parser = Parser(prog="vit-at train", description=__doc__, more_options=fields, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="options and fields")
    add_arguments(parser)
    overrides = [word for word in arguments if word.startswith(_OVERRIDE)]
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
    config = override(config, overrides)
    if options.help:
        print(f"{parser.format_help()}\n{_fields(config)}")
        sys.exit(0)
    return config, options


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """The configuration with the values of '--config.FIELD=VALUE', which may be fractions.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    fields = list(field_names(config))
    for argument in arguments:
        field = argument.removeprefix(_OVERRIDE).partition("=")[0]
        if field not in fields:
            raise UserError(
                f"config field '{field}' is unknown; the nearest are {nearest(field, fields)}"
            )
    words = ["vit-at", *map(_decimal, arguments)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    try:
        values(words)
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(str(error), config)) from error
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; write --config.FIELD=VALUE") from error
    return values.config


def _decimal(argument: str) -> str:
    """'--config.threat.eps=8/255' -> '--config.threat.eps=0.0313...'."""
    match = _FRACTION.match(argument)
    if not match or not float(match[3]):
        return argument
    return f"{match[1]}{float(match[2]) / float(match[3])!r}"


def _illegal_value(message: str, config: ConfigDict) -> str:
    """One sentence for the message of absl about a value that is of another type."""
    match = re.match(r"flag --config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message.strip().splitlines()[-1]
    field, value = match[1], match[2]
    current = get(config, field)
    kind = {"bool": "True or False", "int": "a whole number", "float": "a number"}.get(
        type(current).__name__, f"a {type(current).__name__}"
    )
    return f"{field} is '{value}'; it must be {kind}, such as the recipe's {current!r}"


def _fields(config: ConfigDict) -> str:
    """Every field of a configuration with its value and meaning, one a line."""
    lines = ["fields (--config.FIELD=VALUE) with their values here:"]
    for name, meaning in configs.meanings().items():
        value = get(config, name)
        if isinstance(value, ConfigDict):
            lines.append(f"\n  {name}: {meaning}")
            continue
        shown = f"{value:.4g}" if isinstance(value, float) else repr(value)
        lines.append(f"  {f'{name}={shown}':<42}  {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
