"""``run``, the entry point of AutoAttack, and its ``Result``."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from vit_at.attacks.autoattack import checks, methods
from vit_at.attacks.autoattack.cascade import Cascade
from vit_at.attacks.autoattack.flags import (
    check_model,
    in_words,
    input_gradient,
    judge_outcomes,
)
from vit_at.attacks.autoattack.functions import as_function
from vit_at.attacks.autoattack.ledger import Ledger, Store
from vit_at.attacks.autoattack.packing import Source
from vit_at.attacks.autoattack.settings import TARGETS, Budget, Settings, for_classes, parse
from vit_at.attacks.inputs import as_array, check_shapes
from vit_at.console import Progress
from vit_at.distributed import sharding
from vit_at.distributed.precision import check_precision, products

Array = jax.Array
_FORMAT = 2
_CHECKED = 64  # images on which the model itself is checked
_COMPARED = 8  # of them, whose input gradient a ledger keeps


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcomes of N images.

    robust: {attack: [N] bool} after each attack of the cascade, 'clean' first. If the attacks ran
      individually: each one's own outcome, and last, under 'all', what withstood every attack.
    columns: of ``per_example.npz``.
    failures: {image: reason} of adversarial images that failed the final verification.
    notes: deviations from the version's definition, as sentences.
    flags: {name in ``flags.MEANING``: what was found}, reasons not to trust the accuracy.
    work: {attack: {"steps", "computed", "passes", "unconfirmed"}}: steps of unfinished runs and of
      all slots, cost of a step in forward passes, and successes that do not count because a
      separate forward pass did not confirm them.
    seconds: of this call.
    """

    settings: Settings
    robust: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    failures: dict[int, str]
    notes: tuple[str, ...]
    flags: dict[str, str]
    work: dict[str, dict[str, int]]
    seconds: float
    _images: Any
    _store: Store

    def found(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The adversarial images in parts: places [n] and images [n, H, W, C] float32."""
        return self._store.parts()

    @property
    def adversarial(self) -> np.ndarray:
        """[N, H, W, C] float32: the adversarial image if one was found, else the image itself.

        Holds all images in memory; use ``found`` for large evaluations.
        """
        out = np.array(checks.read(self._images, np.arange(self._images.shape[0])))
        for places, points in self.found():
            out[places] = points
        return out

    def summary(self) -> str:
        """The accuracy after each attack, with notes and failures; one line each."""
        count = len(next(iter(self.robust.values())))
        lines = [f"{self.settings.norm} eps {self.settings.eps:.6g}, {count} images"]
        for attack, robust in self.robust.items():
            lines.append(f"{attack:<10} {robust.mean():7.2%}  ({robust.sum()} of {count})")
        lines += [f"note: {note}" for note in self.notes] + in_words(self.flags)
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
    eps: float | None = None,
    attacks: str | Sequence[str] = "standard",
    batch_size: int = 256,
    seed: int = 0,
    workdir: str | epath.Path | None = None,
    progress: Callable[[str], None] | bool | None = None,
    budget: Budget = Budget(),  # noqa: B008 - immutable
    individually: bool = False,
    keep: str = "first",
    mesh: Mesh | None = None,
    precision: str = "float32",
) -> Result:
    """Runs AutoAttack on all devices.

    Args:
      logits_fn: images [b, H, W, C] float32 in [0, 1] -> logits [b, K]; for attacks='rand',
        (images, key) -> logits. Bind parameters by ``functools.partial(apply, params)``: the
        compiled programs then take them as arguments instead of constants. A Flax linen pair
        (module, variables) or an nnx module serves, too.
      images: [N, H, W, C] in [0, 1], or an object with ``shape`` and ``dtype`` for which
        ``images[places]`` returns rows; rows are read when they are needed.
      labels: [N] integers.
      norm: 'linf', 'l2' or 'l1'. eps: in pixel units; None: 8/255 in linf, while another norm
        needs one.
      attacks: 'standard', 'plus', 'rand', or a list of ``settings.NAMES``, in order.
      batch_size: over all devices.
      seed: the random numbers of an image follow from it and the image's index.
      workdir: directory of the ledger; the same call resumes from it. None or '': in memory.
      progress: called with a line every now and then; True: a bar or lines on standard error.
      budget: iterations, queries, restarts, targets, EOT samples and rho; the default is the
        official one.
      individually: each attack runs on all correct images, not only on those still robust.
      keep: 'first' ends a run at its first adversarial image; 'worst' lets it go on to its last
        step and keeps the adversarial image of highest loss, for transfer and for 8-bit files
        (not in FAB, which looks for the nearest). The outcomes are the same.
      mesh: of ``sharding.make_mesh``; default: all devices.
      precision: of float32 matrix products, one of ``distributed.precision.PRECISIONS``.

    Raises:
      UserError: the input, the model's output or the ledger is not usable.
    """
    mesh = mesh or sharding.make_mesh()
    check_precision("precision", precision, mesh)
    how = (individually, keep, mesh, precision)
    settings = Settings(norm, eps, attacks, batch_size, seed, budget, *how)  # type: ignore[arg-type]
    with products(precision), contextlib.closing(_bar(progress)) as bar:
        return _run(logits_fn, images, labels, settings, workdir, bar)


def _run(logits_fn, images, labels, settings, workdir, bar) -> Result:
    began, names = time.monotonic(), parse(settings.attacks)
    images, labels = as_array("images", images), np.asarray(as_array("labels", labels))
    check_shapes(images, labels)
    checks.check_settings(settings, int(np.prod(images.shape[1:])))
    model = sharding.replicate(as_function(logits_fn), settings.mesh)
    classify = checks.Classifier(model, settings, images.shape[1:])
    targets = settings.budget.targets or TARGETS
    clean = checks.survey(classify, images, labels, settings.batch_size, 1 + targets)
    num_classes, labels = clean.probe.shape[1], labels.astype(np.int32)
    names, notes = for_classes(names, num_classes, targets)
    first = np.arange(min(_CHECKED, settings.batch_size, len(labels)))
    own = (checks.read(images, first), clean.probe[first], labels[first])
    directory = epath.Path(workdir).expanduser() if workdir else None
    compared = directory is not None and names != ("square",)  # which needs no gradient
    gradient = _gradient(classify, own[0], num_classes) if compared else None
    protocol = _protocol(settings, names, clean.digest)
    store = Store(directory, protocol, clean.probe, gradient)
    ledger = Ledger(names, len(labels), settings.individually)
    if not store.load(ledger):
        ledger.clean = clean.ranking[:, 0] == labels
    source = Source(images, labels, clean.ranking)
    attacks = [methods.make(name, settings, num_classes) for name in names]
    flags = check_model(classify, *own, settings)
    cascade = Cascade(attacks, source, classify, ledger, store, settings, bar)
    cascade.run()
    failures = cascade.verify()
    store.save_per_example(ledger)
    robust = ledger.robust_after()
    return Result(
        settings=settings,
        robust=robust,
        columns=ledger.columns(),
        failures=failures,
        notes=tuple(notes),
        flags=flags | judge_outcomes(robust, ledger.work, failures),
        work=ledger.work,
        seconds=time.monotonic() - began,
        _images=images,
        _store=store,
    )


def _gradient(classify: checks.Classifier, images: np.ndarray, num_classes: int) -> np.ndarray:
    """By the first images [n, H, W, C], of a fixed random combination of the logits.

    Computed of all of them: ``check_model`` runs the same program.
    """
    combination = np.random.default_rng(0).normal(size=num_classes).astype(np.float32)
    cotangent = np.tile(combination, (len(images), 1))
    gradient = input_gradient(classify, images, cotangent)[:_COMPARED]
    return np.nan_to_num(gradient, nan=0, posinf=0, neginf=0)


def _protocol(settings: Settings, names: tuple[str, ...], digest: str) -> dict[str, Any]:
    """What a ledger is of, as JSON values; another protocol can't resume it."""
    names_of_own = ("version", "norm", "eps", "seed", "individually", "keep")
    own = {name: getattr(settings, name) for name in names_of_own}
    own |= dataclasses.asdict(settings.budget)
    if settings.precision != "float32":  # older ledgers do not name it
        own["precision"] = settings.precision
    return {"format": _FORMAT, "attacks": list(names), "data": digest} | own


def _bar(progress: Callable[[str], None] | bool | None) -> Progress:
    write = progress if callable(progress) else None
    return Progress(0, unit="passes", at_most=True, enabled=bool(progress), write=write)
