"""Clean, PGD-n, CW-n and AutoAttack accuracy of a work directory or an export.

    python -m vit_at.evaluate runs/cifar10_sgd --attacks=clean,pgd-20,cw-20

Each result is stored with its protocol in ``results.json``, the outcome of each image in
``per_example.npz``.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_at import models
from vit_at.attacks import Threat
from vit_at.config import validate
from vit_at.console import quiet_logging
from vit_at.data import sources
from vit_at.distributed import devices, processes, sharding
from vit_at.errors import UserError, one_sentence_errors
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store, select
from vit_at.evaluation.protocol import parse_attacks
from vit_at.reporting.exported import DESCRIPTION_FILE, load_exported
from vit_at.workdir.checkpoint import Trained, load_trained
from vit_at.workdir.files import disk_errors, locked
from vit_at.workdir.results import Results, table


def fraction(text: str) -> float:
    """'8/255' or '0.03' as a number: how perturbation sizes are written on the command line."""
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except ZeroDivisionError as error:
        raise ValueError(f"'{text}' divides by 0") from error


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit_at.evaluate",
        description="Evaluates a work directory or an export; adds to its results.json.",
    )
    add = parser.add_argument
    add("workdir", help="a directory that python -m vit_at.main or vit_at.export has written")
    add("--attacks", default="clean,pgd-20", help="comma-separated: clean, pgd-N, cw-N, autoattack")
    add("--checkpoint", default="best", choices=("best", "last"))
    add("--split", default="", help="such as test or test[:1000]; default: the configuration's")
    add("--num_examples", type=int, default=0, help="the first so many images; 0: all")
    add("--norm", default="", choices=("linf", "l2"), help="default: as trained, likewise below")
    add("--eps", type=fraction, help="in pixel units of images in [0, 1], such as 8/255")
    add("--step_size", type=fraction, help="likewise")
    add("--restarts", type=int, default=1)
    add("--batch_size", type=int, default=0, help="over all devices")
    add("--seed", type=int, default=0, help="of the random starts")
    add("--data_dir", default="", help="TFDS data directory")
    add("--coordinator", default="", help="HOST:PORT of process 0, of a run of several processes")
    add("--num_processes", type=int, default=0, help="their number; 0: what the cluster says")
    add("--process_id", type=int, default=-1, help="this one's, from 0")
    return parser.parse_args(arguments)


def _load(directory: epath.Path, checkpoint: str) -> tuple[Trained, str]:
    """The weights of a work directory or of an export, and which they are."""
    if (directory / DESCRIPTION_FILE).exists():
        return load_exported(directory), "export"
    return load_trained(directory, checkpoint), checkpoint


def evaluate_workdir(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluates a work directory as the command line says; returns the records."""
    trained, which = _load(epath.Path(options.workdir), options.checkpoint)
    config = ConfigDict(trained.config).unlock()
    config.data.dir = options.data_dir or config.data.dir
    if options.norm not in ("", config.threat.norm) and options.eps is None:
        raise UserError(
            f"--norm is {options.norm}, but the run was trained under {config.threat.norm}, whose "
            "eps means something else; give --eps and --step_size too"
        )
    config.threat.norm = options.norm or config.threat.norm
    for name in ("eps", "step_size"):
        if getattr(options, name) is not None:
            config.threat[name] = getattr(options, name)
    config.eval.batch_size = options.batch_size or config.eval.batch_size
    validate(config)
    if options.restarts < 1:
        raise UserError(f"--restarts is {options.restarts}; it must be 1 or more")
    mesh = sharding.make_mesh()
    sharding.check_batch_size("--batch_size", config.eval.batch_size, mesh)
    threat = Threat.of(config.threat)
    attacks = parse_attacks(options.attacks, threat, options.restarts)
    split = options.split or config.data.test_split
    examples = sources.load(config.data, split, threads=config.data.threads)
    examples = select(examples, options.num_examples)
    apply = models.classifier(trained.model, config.data.mean, config.data.std)
    evaluator = Evaluator(
        apply,
        examples,
        attacks,
        mesh,
        batch_size=config.eval.batch_size,
        seed=options.seed,
        threads=config.data.threads,
    )
    weights = {"checkpoint": which, "step": trained.values["step"]}
    workdir = epath.Path(options.workdir)
    with disk_errors(workdir), locked(workdir, "evaluation"):
        return evaluate_and_store(
            evaluator,
            trained.params,
            examples,
            Results(workdir),
            seed=options.seed,
            weights=weights,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for a mistake of the user's."""
    quiet_logging()
    options = _parse_arguments(arguments)
    shares = max(1, options.num_processes)
    devices.configure(*([options.batch_size // shares] if options.batch_size else []))
    with one_sentence_errors():
        processes.initialize(options.coordinator, options.num_processes, options.process_id)
        with processes.shared_exit():
            processes.end_on_sigterm()  # there is nothing to save
            records = evaluate_workdir(options)
            if jax.process_index() == 0:
                print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
