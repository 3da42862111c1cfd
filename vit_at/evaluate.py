"""Clean, PGD-n, CW-n and AutoAttack accuracy: the same code in training, at its end, on its own.

    python -m vit_at.evaluate runs/cifar10_sgd --attacks=clean,pgd-20,cw-20

Attacks run in float32 with full-precision matrix products. The random start of an image is drawn
from the seed and the image's place in its split, so results do not depend on batch or devices. Each
result is stored with its protocol in ``results.json``, the outcome of each image in
``per_example.npz``.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_at import models, processes, runtime, sharding
from vit_at.attacks import Threat, methods, pgd_attack
from vit_at.attacks.threat import random_start
from vit_at.autoattack_evaluation import evaluate_autoattack
from vit_at.checkpoint import Trained, load_trained
from vit_at.command_line import quiet_logging
from vit_at.config import UserError, one_sentence_errors, validate
from vit_at.data import augment, pipeline, sources
from vit_at.data.sources import Examples
from vit_at.export import DESCRIPTION_FILE, load_exported
from vit_at.metrics import Progress
from vit_at.results import AUTOATTACK, Attack, Results, record, table, weights_digest
from vit_at.workdir import disk_errors, locked

Array = jax.Array
_LOSSES = {"pgd": "ce", "cw": "cw"}
# The cascades by name, and each attack alone; 'rand' is for models that our own are not.
_AUTOATTACKS = {AUTOATTACK: "standard", f"{AUTOATTACK}-plus": "plus"} | {
    n: n for n in methods.NAMES
}


def parse_attacks(names: str, threat: Threat, restarts: int = 1) -> list[Attack]:
    """'clean,pgd-20,cw-20': the numbers are those of the steps.

    Raises:
      UserError: a name of another form.
    """
    return [_parse_attack(name.strip(), threat, restarts) for name in names.split(",")]


def _parse_attack(name: str, threat: Threat, restarts: int) -> Attack:
    if name == "clean":
        return Attack(name, None, threat)
    if name in _AUTOATTACKS:
        return Attack(name, AUTOATTACK, threat, version=_AUTOATTACKS[name])
    kind, _, steps = name.partition("-")
    if kind not in _LOSSES or not steps.isdecimal() or int(steps) < 1:
        raise UserError(
            f"attack '{name}' is unknown; write clean, pgd-N or cw-N with N steps, such as pgd-20, "
            f"or {', '.join(_AUTOATTACKS)}"
        )
    return Attack(name, _LOSSES[kind], dataclasses.replace(threat, steps=int(steps)), restarts)


def make_outcome_fn(
    apply: Callable[..., Array], attack: Attack, mesh: Mesh, seed: int
) -> Callable[[Any, dict[str, Array]], Array]:
    """A compiled (params, batch) -> correct [B] bool: still classified right after the attack."""

    def starts(indices, shape):
        def of_image(index):
            key = jax.random.fold_in(jax.random.key(seed), index)
            keys = jax.random.split(key, attack.restarts)
            return jax.vmap(lambda k: random_start(k, (1, *shape), attack.threat)[0])(keys)

        return jnp.swapaxes(jax.vmap(of_image)(indices), 0, 1)

    def outcome(params, batch):
        logits_fn = functools.partial(apply, models.by_block(apply, params))

        def of_part(part):
            images, labels = augment.to_float(part["image"]), part["label"]
            if attack.loss is not None:
                init = starts(part["index"], images.shape[1:])
                options = {"loss": attack.loss, "init": init}
                images = pgd_attack(logits_fn, images, labels, None, attack.threat, **options)
            return jnp.argmax(logits_fn(images), axis=-1) == labels

        return jax.lax.map(of_part, sharding.in_parts(batch)).reshape(-1)

    specs = (sharding.WHOLE, sharding.SPLIT)
    compiled = jax.jit(sharding.map_shards(outcome, mesh, specs))

    def full_precision(params, batch):
        with jax.default_matmul_precision("highest"):
            return compiled(params, batch)

    return full_precision


class Evaluator:
    """Evaluates parameters on fixed examples; compiled once, used every epoch."""

    def __init__(
        self,
        apply: Callable[..., Array],
        examples: Examples,
        attacks: Sequence[Attack],
        mesh: Mesh,
        *,
        batch_size: int,
        seed: int,
        threads: int = 0,
    ):
        self.attacks = tuple(attacks)
        self._examples, self._mesh = examples, mesh
        self._batches = {"batch_size": batch_size, "threads": threads}
        self._part = {
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        self._apply, self._seed = apply, seed
        self.details: dict[str, dict[str, Any]] = {}  # what records say besides the accuracy
        plain = [a for a in attacks if a.loss != AUTOATTACK]
        self._outcomes = {a.name: make_outcome_fn(apply, a, mesh, seed) for a in plain}

    def __call__(self, params: Any, *, progress: bool = False) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (attack name, correct [N] bool), images in the order of the examples."""
        for attack in self.attacks:
            yield attack.name, self.run(attack, params, progress=progress)

    def run(
        self,
        attack: Attack,
        params: Any,
        *,
        progress: bool = False,
        workdir: epath.Path | None = None,
    ) -> np.ndarray:
        """The outcomes of one of the attacks, correct [N] bool; workdir: of AutoAttack's ledger."""
        batch_size = self._batches["batch_size"]
        if attack.loss == AUTOATTACK:
            correct, self.details[attack.name] = evaluate_autoattack(
                self._apply,
                params,
                self._examples,
                attack,
                self._mesh,
                seed=self._seed,
                batch_size=batch_size,
                workdir=workdir,
                progress=progress,
            )
            return correct
        params = sharding.replicate(params, self._mesh)
        total = -(-len(self._examples) // batch_size)
        bar = Progress(total, 0, "batch") if progress else None
        correct, seen = np.zeros(len(self._examples), bool), 0
        for batch in pipeline.eval_batches(self._examples, **self._batches, **self._part):
            where, real = batch["index"], batch.pop("mask")
            batch["index"] = np.where(real, self._examples.indices[where], 0).astype(np.uint32)
            outcome = self._outcomes[attack.name](params, sharding.split_batch(batch, self._mesh))
            correct[where[real]] = sharding.my_rows(outcome)[real]
            seen += int(real.sum())
            if bar is not None:
                bar.update(f"{attack.name} {correct.sum() / max(seen, 1):.1%} correct")
        if bar is not None:
            bar.close()
        return processes.any_of(correct)


def evaluate_and_store(
    evaluator: Evaluator,
    params: Any,
    examples: Examples,
    results: Results,
    *,
    seed: int,
    weights: dict[str, Any],
) -> list[dict[str, Any]]:
    """Runs an evaluator's attacks and stores each as it ends; what is stored is not run again.

    weights: what to say of them besides their digest: their source and step.
    """
    weights = {"digest": weights_digest(params), **weights}
    describe: dict[str, Any] = {"examples": examples, "seed": seed, "weights": weights}
    records = []
    for attack in evaluator.attacks:
        wanted = record(attack, np.zeros(len(examples), bool), **describe)
        entry: Any = results.find(wanted)
        if not processes.agree(entry is not None):
            correct = evaluator.run(attack, params, progress=True, workdir=results.workdir)
            entry = record(attack, correct, **describe) | evaluator.details.get(attack.name, {})
            results.add(entry, correct, examples)
        records.append(entry)
    return records


def select(examples: Examples, count: int) -> Examples:
    """The first ``count`` examples; 0: all.

    Raises:
      UserError: more than there are, or fewer than none.
    """
    if not 0 <= count <= len(examples):
        raise UserError(
            f"{count} examples are asked for, but {examples.name} has {len(examples)}; "
            "ask for at most these, or for 0 to use all"
        )
    return examples.take(np.arange(count)) if count else examples


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
    runtime.set_up(*([options.batch_size // shares] if options.batch_size else []))
    with one_sentence_errors():
        processes.start(options.coordinator, options.num_processes, options.process_id)
        with processes.together():
            processes.end_on_sigterm()  # there is nothing to save
            records = evaluate_workdir(options)
            if jax.process_index() == 0:
                print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
