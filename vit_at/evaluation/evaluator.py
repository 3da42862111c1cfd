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
from vit_at.attacks.losses import is_correct
from vit_at.attacks.threat import random_start
from vit_at.console import Progress
from vit_at.data import augment, pipeline
from vit_at.data.sources import Examples
from vit_at.distributed import processes, sharding
from vit_at.errors import UserError
from vit_at.evaluation.autoattack import evaluate_autoattack
from vit_at.evaluation.protocol import Attack, record, weights_digest
from vit_at.workdir.results import AUTOATTACK, Results

Array = jax.Array


def make_outcome_fn(
    apply: Callable[..., Array], attack: Attack, mesh: Mesh, seed: int
) -> Callable[[Any, dict[str, Array]], Array]:
    """A compiled (params, batch) -> correct [B] bool: classified correctly after the attack."""

    def starts(indices, shape):
        def of_image(index):
            key = jax.random.fold_in(jax.random.key(seed), index)
            keys = jax.random.split(key, attack.restarts)
            return jax.vmap(lambda k: random_start(k, (1, *shape), attack.threat)[0])(keys)

        return jnp.swapaxes(jax.vmap(of_image)(indices), 0, 1)

    def outcome(params, batch):
        params = models.unstack_blocks(apply, params, sharding.platform(mesh))
        logits_fn = functools.partial(apply, params)

        def of_part(part):
            images, labels = augment.to_float(part["image"]), part["label"]
            if attack.kind != "clean":
                init = starts(part["index"], images.shape[1:])
                options = {"loss": attack.loss, "init": init}
                images = pgd_attack(logits_fn, images, labels, None, attack.threat, **options)
            return is_correct(logits_fn(images), labels)

        return jax.lax.map(of_part, sharding.in_parts(batch, mesh)).reshape(-1)

    specs = (sharding.WHOLE, sharding.SPLIT)
    compiled = jax.jit(sharding.map_shards(outcome, mesh, specs))

    def full_precision(params, batch):
        with jax.default_matmul_precision("highest"):
            return compiled(params, batch)

    return full_precision


@dataclasses.dataclass
class Evaluator:
    """Evaluates parameters on fixed examples; compiled once, used every epoch.

    details: {attack name: what its record says besides the accuracy}, after AutoAttack.
    """

    apply: Callable[..., Array]
    examples: Examples
    attacks: Sequence[Attack]
    mesh: Mesh
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int
    threads: int = 0
    details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self):
        plain = [a for a in self.attacks if a.kind != AUTOATTACK]
        compiled = functools.partial(make_outcome_fn, self.apply, mesh=self.mesh, seed=self.seed)
        self._outcomes = {attack.name: compiled(attack) for attack in plain}

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
            correct, self.details[attack.name] = evaluate_autoattack(
                self.apply, params, examples, attack, mesh, **options
            )
            return correct
        params = sharding.replicate(params, mesh)
        bar = Progress(-(-len(examples) // batch_size), 0, "batches") if progress else None
        correct, accuracy = np.zeros(len(examples), bool), Average.empty()
        process = (jax.process_index(), jax.process_count())
        for batch in pipeline.eval_batches(
            examples, batch_size=batch_size, threads=self.threads, process=process
        ):
            where, real = batch["index"], batch.pop("mask")
            batch["index"] = np.where(real, examples.indices[where], 0).astype(np.uint32)
            outcome = self._outcomes[attack.name](params, sharding.split_batch(batch, mesh))
            rows = sharding.my_rows(outcome)
            correct[where[real]] = rows[real]
            if bar is not None:
                accuracy = accuracy.merge(Average.from_model_output(rows, mask=real))
                bar.update(f"{attack.name} {accuracy.compute():.1%} correct")
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
            entry = record(attack, correct, **describe) | evaluator.details.get(attack.name, {})
            results.add(entry, correct, examples)
        records.append(entry)
    return records


def select(examples: Examples, count: int) -> Examples:
    """The first ``count`` examples, 0: all.

    Raises:
      UserError: the count is negative or too large, or the split holds an image twice.
    """
    for split in {name for name, _ in examples.origin}:
        places = np.concatenate([rows for name, rows in examples.origin if name == split])
        if repeated := len(places) - len(np.unique(places)):
            raise UserError(
                f"{examples.name} holds {repeated} images of '{split}' more than once; choose "
                "parts that do not overlap"
            )
    if not 0 <= count <= len(examples):
        raise UserError(
            f"{count} examples are asked for, but {examples.name} has {len(examples)}; "
            "ask for at most these, or for 0 to use all"
        )
    return examples.take(np.arange(count)) if count else examples
