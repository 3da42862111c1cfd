"""Clean, PGD-n, CW-n and AutoAttack accuracy, by the same code in training and after it.

    python -m vit_at.evaluate runs/cifar10_sgd --attacks=clean,pgd-20,cw-20

Attacks run in float32 with full-precision matrix products. The random start of an image is drawn
from the seed and the image's place in its split, so results do not depend on batch or devices. Each
result is stored with its protocol in ``results.json``, the outcome of each image in
``per_example.npz``.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from etils import epath
from jax.sharding import Mesh

from vit_at import models
from vit_at.attacks import pgd_attack
from vit_at.attacks.losses import is_correct, margin
from vit_at.attacks.threat import Threat, random_start
from vit_at.console import Progress
from vit_at.data import augment, pipeline
from vit_at.data.examples import Examples
from vit_at.distributed import precision, processes, sharding
from vit_at.evaluation.autoattack import evaluate_autoattack
from vit_at.evaluation.protocol import Attack, record, weights_digest
from vit_at.workdir.results import AUTOATTACK, Results

Array = jax.Array


def make_outcome_fn(
    apply: Callable[..., Array], attack: Attack, mesh: Mesh, seed: int
) -> Callable[..., dict[str, Array]]:
    """A compiled (params, batch) -> 'correct' [B] bool: classified correctly after the attack.

    It also takes a ``threat`` in place of the attack's. One of the same norm and steps is not
    compiled again. Of the kind 'clean' it also gives 'prediction' [B] and 'margin' [B], see
    ``answer``.
    """

    def of_part(logits_fn, part, threat):
        images, labels = augment.to_float(part["image"]), part["label"]
        if attack.kind == "clean":
            return answer(logits_fn(images), labels)
        images = perturb(logits_fn, images, part, attack, threat, seed)
        return {"correct": is_correct(logits_fn(images), labels)}

    return by_parts(apply, of_part, mesh, attack)


def by_parts(
    apply: Callable[..., Array], of_part: Callable[..., Any], mesh: Mesh, attack: Attack
) -> Callable[..., Any]:
    """A compiled (params, batch, threat) -> what ``of_part(logits_fn, part, threat)`` gives.

    of_part: of some images of a batch, in the attack's precision; all it gives begins with an axis
      of images. attack: its threat is taken where none is given.
    """

    def outcome(params, batch, threat):
        params = models.unstack_blocks(apply, params)
        logits_fn = functools.partial(apply, params)
        found = jax.lax.map(
            lambda part: of_part(logits_fn, part, threat), sharding.in_parts(batch, mesh)
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    specs = (sharding.WHOLE, sharding.SPLIT, sharding.WHOLE)
    compiled = jax.jit(sharding.map_shards(outcome, mesh, specs))

    def in_precision(params, batch, threat=attack.threat):
        with precision.products(attack.precision):
            return compiled(params, batch, threat)

    return in_precision


def perturb(
    logits_fn: Callable[[Array], Array],
    images: Array,
    part: dict[str, Array],
    attack: Attack,
    threat: Threat,
    seed: int,
) -> Array:
    """Images [b, H, W, C] after PGD or CW, whose starts depend on the seed and 'index' alone."""

    def starts(index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        keys = jax.random.split(key, attack.restarts)
        shape = (1, *images.shape[1:])
        return jax.vmap(lambda k: random_start(k, shape, threat)[0])(keys)

    init = jnp.swapaxes(jax.vmap(starts)(part["index"]), 0, 1)
    options: dict[str, Any] = {"loss": attack.loss, "init": init}
    return pgd_attack(logits_fn, images, part["label"], None, threat, **options)


def answer(logits: Array, labels: Array) -> dict[str, Array]:
    """'correct' [b] bool, 'prediction' [b] int32 and 'margin' [b] of logits [b, K]."""
    return {
        "correct": is_correct(logits, labels),
        "prediction": logits.argmax(-1).astype(jnp.int32),
        "margin": margin(logits, labels),
    }


@dataclasses.dataclass
class Evaluator:
    """Evaluates parameters on fixed examples; compiled once, used every epoch.

    details: {attack: what its record says besides the accuracy}, after AutoAttack.
    answers: 'label', 'prediction' and 'margin' [N] of the clean images, after that run.
    """

    apply: Callable[..., Array]
    examples: Examples
    attacks: Sequence[Attack]
    mesh: Mesh
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int
    threads: int = 0
    details: dict[Attack, dict[str, Any]] = dataclasses.field(default_factory=dict, init=False)
    answers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self):
        compiled = functools.partial(make_outcome_fn, self.apply, mesh=self.mesh, seed=self.seed)
        plain = [a for a in self.attacks if a.kind != AUTOATTACK]
        self._outcomes = {(a.kind, a.restarts): compiled(a) for a in plain}

    def __call__(self, params: Any, *, progress: bool = False) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (attack name, correct [N] bool), in the order of the examples."""
        for attack in self.attacks:
            yield attack.name, self.run(attack, params, progress=progress)

    def run(
        self,
        attack: Attack,
        params: Any,
        *,
        progress: bool = False,
        workdir: epath.Path | None = None,
        digest: str = "",
    ) -> np.ndarray:
        """Correct [N] bool after one of the attacks.

        workdir, digest: where AutoAttack's progress is stored, and of which weights.
        """
        examples, batch_size, mesh = self.examples, self.batch_size, self.mesh
        if attack.kind == AUTOATTACK:
            options: dict[str, Any] = {"seed": self.seed, "batch_size": batch_size}
            options |= {"workdir": workdir, "digest": digest, "progress": progress}
            correct, self.details[attack] = evaluate_autoattack(
                self.apply, params, examples, attack, mesh, **options
            )
            return correct
        params = sharding.replicate(params, mesh)
        bar = Progress(-(-len(examples) // batch_size), 0, "batches") if progress else None
        found: dict[str, np.ndarray] = {}
        outcomes, accuracy = self._outcomes[attack.kind, attack.restarts], Average.empty()
        for where, real, batch in global_batches(examples, batch_size, mesh, self.threads):
            outcome = jax.tree.map(sharding.my_rows, outcomes(params, batch, attack.threat))
            if attack.kind == "clean":
                outcome["label"] = sharding.my_rows(batch["label"])
            for name, rows in outcome.items():
                whole = found.setdefault(name, np.zeros(len(examples), rows.dtype))
                whole[where[real]] = rows[real]
            if bar is not None:
                accuracy = accuracy.merge(Average.from_model_output(outcome["correct"], mask=real))
                bar.update(f"{attack.name} {accuracy.compute():.1%} correct")
        if bar is not None:
            bar.close()
        correct = processes.any_of(found.pop("correct"))
        if found:
            self.answers = {name: processes.sum_of(values) for name, values in found.items()}
        return correct


def global_batches(
    examples: Examples, batch_size: int, mesh: Mesh, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Array]]]:
    """Yields (positions [b], which are no padding [b] bool, the batch on the devices).

    The first two are of this process's rows. 'index' of the batch is the image's place in its
    split.
    """
    process = (jax.process_index(), jax.process_count())
    for batch in pipeline.eval_batches(
        examples, batch_size=batch_size, threads=threads, process=process
    ):
        where, real = batch["index"], batch.pop("mask")
        batch["index"] = np.where(real, examples.indices[where], 0).astype(np.uint32)
        yield where, real, sharding.split_batch(batch, mesh)


def evaluate_and_store(
    evaluator: Evaluator,
    params: Any,
    examples: Examples,
    results: Results,
    *,
    seed: int,
    weights: dict[str, Any],
) -> list[dict[str, Any]]:
    """Runs an evaluator's attacks and stores each result; a result that is stored is not run again.

    weights: what records say of the weights: their source and step; with a 'digest' in place of
      that of the parameters, where they alone do not identify the function.
    """
    weights = {"digest": weights_digest(params), **weights}
    describe: dict[str, Any] = {"examples": examples, "seed": seed, "weights": weights}
    records = []
    for attack in evaluator.attacks:
        wanted = record(attack, np.zeros(len(examples), bool), **describe)
        entry: Any = results.find(wanted)
        if not processes.agree(entry is not None):
            place = {"workdir": results.workdir, "digest": weights["digest"]}
            correct = evaluator.run(attack, params, progress=True, **place)
            entry = record(attack, correct, **describe) | evaluator.details.get(attack, {})
            answers = evaluator.answers if attack.kind == "clean" else {}
            results.add(entry, correct, examples, answers)
        records.append(entry)
    return records
