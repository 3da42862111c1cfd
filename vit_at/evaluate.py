"""Clean, PGD-n, CW-n and AutoAttack accuracy of a work directory or an export.

    vit-at evaluate runs/cifar10_sgd --attacks=clean,pgd-20,cw-20

Each result is stored with its protocol in ``results.json``, the outcome of each image in
``per_example.npz``.
"""

import argparse
import inspect
import os
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_at import models
from vit_at.attacks import Threat
from vit_at.cli import add_process_arguments, join_processes
from vit_at.config import CHOICES, evaluation_threat, validate
from vit_at.console import quiet_logging
from vit_at.data import sources
from vit_at.distributed import devices, processes, sharding
from vit_at.errors import Parser, UserError, explained_errors, one_sentence_errors
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store, select
from vit_at.evaluation.protocol import parse_attacks
from vit_at.workdir.checkpoint import load_trained
from vit_at.workdir.exported import DESCRIPTION_FILE, load_exported
from vit_at.workdir.files import disk_errors, locked
from vit_at.workdir.results import Results, as_text

_TYPES: dict[Any, tuple[Any, str]] = {
    str: (str, "a string"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}
_MOST_RESTARTS = 1000  # their starts are in memory together


def fraction(text: str) -> float:
    """'8/255' or '0.03' as a number: how perturbation sizes are written on the command line."""
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except ZeroDivisionError as error:
        raise ValueError(f"'{text}' divides by 0") from error


def evaluate(
    source: epath.PathLike,
    attacks: str = "clean,pgd-20",
    *,
    checkpoint: str = "best",
    split: str = "",
    num_examples: int = 0,
    norm: str = "",
    eps: float | None = None,
    step_size: float | None = None,
    restarts: int = 1,
    batch_size: int = 0,
    seed: int = 0,
    data_dir: str = "",
) -> list[dict[str, Any]]:
    """Measures the accuracy of a work directory or an export under attacks.

    A result that ``results.json`` has under the same protocol is not measured again.

    Args:
      source: a directory that ``vit_at.train`` or the export has written.
      attacks: comma-separated: clean, pgd-N, cw-N, autoattack.
      checkpoint: 'best' or 'last'; of a work directory.
      split: such as 'test[:1000]'; '': the configuration's.
      num_examples: the first so many images of it; 0: all.
      norm, eps, step_size: of the attacks, in pixel units of images in [0, 1]; '' and None: as in
        ``eval.threat``.
      restarts: random starts of PGD and CW, at most 1000; an image counts as robust if all fail.
      batch_size: over all devices; 0: the configuration's.
      seed: of the random starts.
      data_dir: TFDS data directory, or the one that holds 'folder:NAME'; '': the configuration's.

    Returns:
      One record for each attack, as in ``results.json``: accuracy, standard error, protocol.

    Raises:
      UserError: a directory, data set or option that can't be used.
    """
    _check_arguments(locals())
    workdir = epath.Path(source).expanduser()
    exported = (workdir / DESCRIPTION_FILE).exists()
    trained = load_exported(workdir) if exported else load_trained(workdir, checkpoint)
    config = ConfigDict(trained.config).unlock()
    _set_threat(config, norm, eps, step_size)
    config.data.dir = data_dir or config.data.dir
    config.eval.batch_size = batch_size or config.eval.batch_size
    validate(config)
    mesh = sharding.make_mesh()
    sharding.check_batch_size("--batch_size", config.eval.batch_size, mesh)
    parsed = parse_attacks(attacks, Threat.of(evaluation_threat(config)), restarts)
    threads = config.data.threads
    examples = sources.load(config.data, split or config.data.test_split, threads=threads)
    examples = select(examples, num_examples)
    apply = models.classifier(trained.model, config.data.mean, config.data.std)
    options = {"batch_size": config.eval.batch_size, "seed": seed, "threads": threads}
    evaluator = Evaluator(apply, examples, parsed, mesh, **options)
    which = "export" if exported else checkpoint
    weights = {"checkpoint": which, "step": trained.values["step"]}
    with disk_errors(workdir), locked(workdir, "evaluation"):
        return evaluate_and_store(
            evaluator, trained.params, examples, Results(workdir), seed=seed, weights=weights
        )


def _check_arguments(given: dict[str, Any]) -> None:
    """Checks types and choices, for calls from Python, and ranges."""
    for name, parameter in inspect.signature(evaluate).parameters.items():
        value, allowed = given[name], typing.get_args(parameter.annotation)
        kind, words = _TYPES.get((*allowed, parameter.annotation)[0], (object, ""))
        if name == "source":
            kind, words = (str, os.PathLike), "the path of a directory"
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits and not (value is None and types.NoneType in allowed):
            raise UserError(f"{name} is {value!r}; it must be {words}")
    if given["checkpoint"] not in CHOICES["eval.checkpoint"]:
        choices = " or ".join(CHOICES["eval.checkpoint"])
        raise UserError(f"checkpoint is '{given['checkpoint']}'; it must be {choices}")
    restarts, seed = given["restarts"], given["seed"]
    if restarts < 1:
        raise UserError(f"--restarts is {restarts}; it must be 1 or more")
    if restarts > _MOST_RESTARTS:
        raise UserError(f"--restarts is {restarts}; it must be at most {_MOST_RESTARTS}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; it must be from 0 to {2**32 - 1}")


def _set_threat(config: ConfigDict, norm: str, eps: float | None, step_size: float | None) -> None:
    """Changes the threat of evaluation to the one that is asked for."""
    before = evaluation_threat(config)
    if norm not in ("", before.norm) and eps is None:
        raise UserError(
            f"--norm is {norm}, but the run is evaluated under {before.norm}, whose eps means "
            "something else; give --eps and --step_size too"
        )
    own = config.eval.threat
    own.norm = norm or before.norm
    own.eps = before.eps if eps is None else eps
    own.step_size = before.step_size if step_size is None else step_size
    for name, value in (("--eps", own.eps), ("--step_size", own.step_size)):
        if not value > 0:
            raise UserError(f"{name} is {value:g}; it must be over 0, such as 8/255")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command: arguments of ``evaluate``, and those of processes."""
    add = parser.add_argument
    add("source", metavar="WORKDIR", help="what 'vit-at train' or 'vit-at export' has written")
    add("--attacks", default="clean,pgd-20", help="comma-separated: clean, pgd-N, cw-N, autoattack")
    add("--checkpoint", default="best", choices=("best", "last"))
    add("--split", default="", help="such as test or test[:1000]; default: the configuration's")
    add("--num_examples", type=int, default=0, help="the first so many images; 0: all")
    add(
        "--norm",
        default="",
        choices=("linf", "l2", "l1"),
        help="default: as trained, likewise below",
    )
    add("--eps", type=fraction, help="in pixel units of images in [0, 1], such as 8/255")
    add("--step_size", type=fraction, help="in the same units")
    add("--restarts", type=int, default=1, help="random starts of PGD and CW")
    add("--batch_size", type=int, default=0, help="over all devices")
    add("--seed", type=int, default=0, help="of the random starts")
    add("--data_dir", default="", help="of TFDS, or the one that holds folder:NAME")
    add_process_arguments(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit status, 2 for a mistake of the user's."""
    quiet_logging()
    parser = Parser(prog="vit-at evaluate", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    shares = max(1, options.num_processes)
    batch_sizes = [options.batch_size // shares] if options.batch_size else []
    with one_sentence_errors(options.source):
        devices.configure(*batch_sizes, cache=options.compilation_cache)
        join_processes(options)
        with processes.shared_exit(), explained_errors(options.source):
            processes.end_on_sigterm()  # there is nothing to save
            names = inspect.signature(evaluate).parameters
            records = evaluate(**{name: getattr(options, name) for name in names})
            if jax.process_index() == 0:
                print(as_text(records))
    return 0


class _Callable(types.ModuleType):
    """Lets ``vit_at.evaluate`` be called, as it is this module once this has been imported."""

    def __call__(self, *args: Any, **options: Any) -> list[dict[str, Any]]:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
