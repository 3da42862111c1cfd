"""Adversarial training of vision transformers: train, attack and report.

    vit-at train digits_sgd                  a run in runs/digits_sgd; a second start resumes it
    vit-at evaluate runs/digits_sgd --attacks=pgd-100
    vit-at COMMAND --help                    the options of a command

``python -m vit_at COMMAND`` is the same as ``vit-at COMMAND``.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

import vit_at
from vit_at.errors import Parser, nearest, one_sentence_errors

# {command: (its module, what the help says)}. A module has ``main(arguments) -> exit status``, and
# ``add_arguments(parser)`` for completion. By names, so that a command loads only what it needs.
COMMANDS = {
    "train": ("vit_at.main", "train the model of a recipe, or resume its run"),
    "evaluate": ("vit_at.evaluate", "measure clean, PGD, CW and AutoAttack accuracy"),
    "report": ("vit_at.report", "write runs as one HTML page, or as a table"),
    "export": ("vit_at.export", "write the weights of a run for PyTorch"),
    "prepare": ("vit_at.prepare", "download and store a data set"),
    "sweep": ("vit_at.reporting.sweep", "start the runs of a recipe's sweep"),
    "recipes": ("vit_at.reporting.list_recipes", "list the recipes: cost and variants"),
    "models": ("vit_at.reporting.list_models", "list the models: size and cost"),
}
SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 for a mistake of the user's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        with one_sentence_errors():  # its own begins after its imports, which take seconds
            return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    parser, _ = _parsers()
    if arguments and not arguments[0].startswith("-"):
        near = nearest(arguments[0], COMMANDS)
        parser.error(f"command '{arguments[0]}' is unknown; the nearest are {near}")
    options = parser.parse_args(arguments)
    if not options.print_completion:
        parser.error(f"no command is given; choose one of {', '.join(COMMANDS)}")
    print(completion(options.print_completion))
    return 0


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of ``vit-at``, and those of its commands, still without options."""
    parser = Parser(prog="vit-at", description=__doc__)
    parser.add_argument("--version", action="version", version=f"vit_at {vit_at.__version__}")
    parser.add_argument(
        "--print-completion", choices=SHELLS, help="print a completion script for this shell"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    subparsers = {name: commands.add_parser(name, help=h) for name, (_, h) in COMMANDS.items()}
    return parser, subparsers


def completion(shell: str) -> str:
    """The script that completes commands, options, and names of recipes and models in a shell.

    By shtab and not argcomplete, which starts Python at every press of the tab key.
    """
    import shtab

    from vit_at import configs, models

    words = {"RECIPE": configs.names(), "MODEL": models.NAMES}
    parser, subparsers = _parsers()
    for name, subparser in subparsers.items():
        importlib.import_module(COMMANDS[name][0]).add_arguments(subparser)
        for action in subparser._actions:
            action.choices = words.get(str(action.metavar), action.choices)
            if action.metavar == "WORKDIR":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that can run as several processes, or compiles programs."""
    group = parser.add_argument_group("processes and compilation")
    add = group.add_argument
    add("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    add("--num_processes", type=int, default=0, metavar="N", help="0: what the cluster says")
    add("--process_id", type=int, default=-1, metavar="I", help="of this process, from 0")
    add("--wait_seconds", type=int, default=300, metavar="S", help="for the other processes")
    kept = "compiled programs; by default ~/.cache/vit_at, or in the run's bucket; '': none"
    add("--compilation_cache", default=None, metavar="DIR", help=kept)


def join_processes(options: argparse.Namespace) -> None:
    """Joins the other processes that these options name; before JAX is used."""
    from vit_at.distributed import processes

    number = (options.coordinator, options.num_processes, options.process_id)
    processes.initialize(*number, seconds=options.wait_seconds)
