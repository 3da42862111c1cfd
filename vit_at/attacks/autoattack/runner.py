"""AutoAttack (Croce and Hein 2020): the standard by which robust accuracy is believed.

    result = autoattack.run(functools.partial(apply, params), images, labels, eps=8 / 255)
    print(result.summary())

A cascade of attacks, each only on the images that have withstood those before, with the official
parameters. ``methods`` says what the attacks are, ``packing`` keeps the devices busy, ``ledger``
keeps the outcomes; this module checks the input, runs the cascade and verifies its result.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from vit_at.attacks.autoattack import checks, methods
from vit_at.attacks.autoattack.cascade import Cascade, Protocol
from vit_at.attacks.autoattack.ledger import Ledger, Store
from vit_at.attacks.autoattack.packing import Source, programs
from vit_at.distributed import sharding

Array = jax.Array
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """What a cascade has found about N images.

    robust: {attack: [N] bool} after each attack of the cascade, 'clean' first.
    table: the columns of ``per_example.npz``.
    failures: images whose adversarial image did not pass the final verification, with the reason.
    notes: what was done differently from the version's definition, as sentences.
    work: {attack: {"steps", "computed", "passes", "unconfirmed"}}: steps of unfinished images, of
      all slots, the cost of a step in forward passes, and successes that a forward pass of their
      own did not confirm, so that they don't count.
    seconds: of this call.
    """

    norm: str
    eps: float
    robust: dict[str, np.ndarray]
    table: dict[str, np.ndarray]
    failures: dict[int, str]
    notes: tuple[str, ...]
    work: dict[str, dict[str, int]]
    seconds: float
    _images: Any
    _store: Store

    def found(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The adversarial images, some at a time: places [n] and images [n, H, W, C] float32."""
        return self._store.parts()

    @property
    def adversarial(self) -> np.ndarray:
        """[N, H, W, C] float32: adversarial where one was found, elsewhere the image itself.

        All in memory at once; ``found`` is for evaluations that are larger than it.
        """
        out = np.array(checks.read(self._images, np.arange(self._images.shape[0])))
        for places, points in self.found():
            out[places] = points
        return out

    @property
    def robust_accuracy(self) -> float:
        """The worst case over all attacks."""
        return float(list(self.robust.values())[-1].mean())

    def summary(self) -> str:
        """Accuracies after each attack, and everything that a reader should know of them."""
        count = len(next(iter(self.robust.values())))
        lines = [f"{self.norm} eps {self.eps:.6g}, {count} images"]
        for attack, robust in self.robust.items():
            lines.append(f"{attack:<10} {robust.mean():7.2%}  ({robust.sum()} of {count})")
        lines += [f"note: {note}" for note in self.notes]
        for attack, work in self.work.items():
            if work["unconfirmed"]:
                lines.append(f"{work['unconfirmed']} successes of {attack} were not confirmed")
        if self.failures:
            lines.append(f"not verified: {len(self.failures)} adversarial images, first: ")
            lines[-1] += "; ".join(f"{i}: {why}" for i, why in list(self.failures.items())[:3])
        return "\n".join(lines)


def run(
    logits_fn: Callable[..., Array],
    images: Any,
    labels: np.ndarray,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    attacks: str | Sequence[str] = "standard",
    batch_size: int = 256,
    seed: int = 0,
    workdir: str | epath.Path | None = None,
    progress: Callable[[str], None] | bool | None = None,
    mesh: Mesh | None = None,
    iterations: int = methods.ITERATIONS,
    queries: int = methods.QUERIES,
) -> Result:
    """Runs AutoAttack on all devices.

    Args:
      logits_fn: images [b, H, W, C] float32 in [0, 1] -> logits [b, K]. Give parameters through
        ``functools.partial(apply, params)``: they then are arguments of the compiled programs, not
        constants in them. For attacks='rand': (images, key) -> logits.
      images: [N, H, W, C] in [0, 1]; labels: [N] integers. Anything with ``shape`` and ``dtype``
        serves whose rows ``images[places]`` gives: images are read when they are needed.
      norm: 'linf' or 'l2'; eps: in pixel units.
      attacks: 'standard', 'plus', 'rand', or a list of methods.NAMES, in order.
      batch_size: over all devices.
      seed: an image's random numbers follow from it and the image's place alone.
      workdir: where the ledger is kept; the same call goes on from it.
      progress: takes a line now and then; True: to standard error.
      mesh: of sharding.make_mesh; default: all devices.
      iterations, queries: of APGD and FAB, and of Square; the official ones unless given.

    Raises:
      UserError: the input, the model's output or the ledger can't be used; the sentence says why.
    """
    began, mesh = time.monotonic(), mesh or sharding.make_mesh()
    names = methods.parse(attacks if isinstance(attacks, str) else tuple(attacks))
    version = attacks if isinstance(attacks, str) and attacks in methods.VERSIONS else "custom"
    checks.check_protocol(norm, eps, batch_size, iterations, queries, mesh)
    images, labels = checks.check_shapes(images, labels)
    model = sharding.replicate(_as_tree(logits_fn), mesh)
    with jax.default_matmul_precision("highest"):
        classify = checks.Classifier(model, mesh, version == "rand", seed, images.shape[1:])
        clean = checks.survey(classify, images, labels, batch_size, 1 + methods.TARGETS)
        num_classes = clean.probe.shape[1]
        names, notes = methods.for_classes(names, num_classes)
        options = {"iterations": iterations, "queries": queries}
        known = {"version": version, "norm": norm, "num_classes": num_classes, **options}
        settings = tuple(known.items())
        protocol = {
            "format": _FORMAT,
            "attacks": list(names),
            "version": version,
            "norm": norm,
            "eps": float(eps),
            "seed": seed,
            "data": clean.digest,
            **options,
        }
        directory = None if workdir is None else epath.Path(workdir)
        ledger = Ledger(names, len(labels))
        store = Store(directory, protocol, clean.probe[:64])
        if not store.load(ledger):
            ledger.clean = clean.ranking[:, 0] == labels
        cascade = Cascade(
            [programs(name, settings, mesh, version == "rand") for name in names],
            Source(images, labels, clean.ranking),
            classify,
            ledger,
            store,
            Protocol(norm, float(eps), seed, batch_size),
            _reporter(progress),
        )
        cascade.run()
        failures = cascade.verify()
        store.save_table(ledger)
    return Result(
        norm=norm,
        eps=float(eps),
        robust=ledger.robust_after(),
        table=ledger.table(),
        failures=failures,
        notes=tuple(notes),
        work=ledger.work,
        seconds=time.monotonic() - began,
        _images=images,
        _store=store,
    )


def _as_tree(logits_fn: Callable[..., Array]) -> jax.tree_util.Partial:
    """The function with its bound parameters as a tree of arrays, an argument for jit."""
    if isinstance(logits_fn, functools.partial):
        return jax.tree_util.Partial(logits_fn.func, *logits_fn.args, **logits_fn.keywords)
    return jax.tree_util.Partial(logits_fn)


def _reporter(progress: Callable[[str], None] | bool | None) -> Callable[[str], None]:
    if callable(progress):
        return progress
    if progress:
        return lambda line: print(line, file=sys.stderr, flush=True)
    return lambda line: None
