"""The attacks of AutoAttack one after the other, each on the images that are still robust.

Every success is confirmed by a forward pass of its own before it counts, and all are verified again
at the end. The ledger is written after every round, unless writing would take a noticeable share of
the time.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vit_at.attacks.autoattack.checks import Classifier, read
from vit_at.attacks.autoattack.ledger import BROKEN, WITHSTOOD, Ledger, Store
from vit_at.attacks.autoattack.methods import Method
from vit_at.attacks.autoattack.packing import Finished, Packing, Programs, Source
from vit_at.distributed import processes

_PIXEL_ROUNDING = 1.2e-7  # what float32 may add to the difference of two pixels in [0, 1]
_WRITING_SHARE = 0.05  # of the time that writing the ledger may take
_SECONDS_BETWEEN_LINES = 30.0
_CONFIRM_PER_DEVICE = 8  # images in a batch that confirms


class Protocol(NamedTuple):
    """norm, eps in pixel units, seed, batch size over all devices."""

    norm: str
    eps: float
    seed: int
    batch_size: int


class Cascade:
    """Runs attacks on the images of a source and keeps the ledger."""

    def __init__(
        self,
        cascade: list[Programs],
        source: Source,
        classify: Classifier,
        ledger: Ledger,
        store: Store,
        protocol: Protocol,
        report: Callable[[str], None],
    ):
        self._cascade, self._source, self._classify = cascade, source, classify
        self._ledger, self._store, self._protocol, self._report = ledger, store, protocol, report
        self._began = self._last_line = self._last_save = time.monotonic()
        self._save_seconds = 0.0
        self._resumed_with = _passes(ledger)

    def run(self) -> None:
        """Runs, or goes on with, what the ledger says is left."""
        ledger = self._ledger
        while ledger.stage < len(self._cascade) and ledger.robust.any():
            self._attack(self._cascade[ledger.stage])
            name = self._cascade[ledger.stage].method.name
            ledger.stage += 1
            ledger.progress = {}
            self._save()
            share = ledger.robust.mean()
            self._report(f"{name}: {share:.2%} robust ({ledger.robust.sum()} images)")

    def _attack(self, programs: Programs) -> None:
        ledger, protocol = self._ledger, self._protocol
        classify, method = self._classify, programs.method
        packing = Packing(
            programs,
            classify.model,
            self._source,
            classify.mesh,
            seed=protocol.seed,
            eps=protocol.eps,
            batch_size=protocol.batch_size,
        )
        if ledger.progress:
            packing.restore(ledger.progress)
        else:
            packing.begin(np.flatnonzero(ledger.robust))
        unconfirmed = ledger.work.get(method.name, {}).get("unconfirmed", 0)
        for finished in packing.rounds():
            unconfirmed += self._record(finished)
            ledger.work[method.name] = packing.work | {"passes": method.passes}
            ledger.work[method.name]["unconfirmed"] = unconfirmed
            self._save_now_and_then(packing)
            self._report_now_and_then(method, packing)

    def _record(self, finished: list[Finished]) -> int:
        """Enters the ends of some images; a success only if a forward pass confirms it. Returns the
        number of those that it does not.
        """
        ledger, column = self._ledger, self._ledger.stage
        fallen = [f for f in finished if f.adversarial is not None]
        flaws = {}
        if fallen:
            points = np.stack([f.adversarial for f in fallen])
            flaws = self._flaws(np.array([f.image for f in fallen]), points, draw=1 + column)
        for end in finished:
            broken = end.adversarial is not None and end.image not in flaws
            ledger.outcome[end.image, column] = BROKEN if broken else WITHSTOOD
            if broken:
                delta = end.adversarial - read(self._source.images, np.array([end.image]))
                ledger.found[end.image] = end.adversarial
                ledger.run[end.image], ledger.step[end.image] = end.run, end.step
                ledger.norm[end.image] = _norm(delta, self._protocol.norm)[0]
        return len(flaws)

    def verify(self) -> dict[int, str]:
        """What is wrong with any of the adversarial images, {image: reason}."""
        processes.barrier("ledger written")  # what is verified is what is on disk
        flaws, size = {}, self._protocol.batch_size
        for places, points in self._store.parts():
            for begin in range(0, len(places), size):
                some = slice(begin, begin + size)
                flaws |= self._flaws(places[some], points[some], draw=0)
        return dict(sorted(flaws.items()))

    def _flaws(self, places: np.ndarray, points: np.ndarray, draw: int) -> dict[int, str]:
        """Why points [n, H, W, C] are no adversarial images of the images at some places."""
        eps, norm = self._protocol.eps, self._protocol.norm
        unit = _CONFIRM_PER_DEVICE * self._classify.mesh.size
        width = min(unit, self._protocol.batch_size)
        logits = self._classify(points, width, places, draw)
        sizes = _norm(points - read(self._source.images, places), norm)
        reasons = {
            "outside [0, 1]": (points.min((1, 2, 3)) < 0) | (points.max((1, 2, 3)) > 1),
            "outside the ball": ~(sizes <= largest_norm(norm, eps, points[0].size)),
            "logits are not finite": ~np.isfinite(logits).all(1),
            "classified correctly": logits.argmax(1) == self._source.labels[places],
        }
        return {
            int(place): reason
            for reason, wrong in reversed(reasons.items())
            for place in places[wrong]
        }

    def _save(self) -> None:
        began = time.monotonic()
        self._store.save(self._ledger)
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - began

    def _save_now_and_then(self, packing: Packing) -> None:
        """Saves unless that would take over a twentieth of the time."""
        since = time.monotonic() - self._last_save
        due = since >= self._save_seconds / _WRITING_SHARE
        if self._store.keeps and processes.agree(due):
            self._ledger.progress = packing.snapshot()
            self._save()
            self._ledger.progress = {}

    def _report_now_and_then(self, method: Method, packing: Packing) -> None:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        done = _passes(self._ledger) - self._resumed_with
        left = packing.steps_left() * method.passes
        later = [p.method for p in self._cascade[self._ledger.stage + 1 :]]
        left += int(self._ledger.robust.sum()) * sum(m.runs * m.steps * m.passes for m in later)
        seconds = (now - self._began) * left / max(done, 1)
        self._report(
            f"{method.name}: {packing.unfinished()} images under attack, "
            f"{self._ledger.robust.mean():.2%} still robust, at most {seconds / 60:.0f} min left"
        )


def _passes(ledger: Ledger) -> int:
    """Forward passes of single images so far."""
    return sum(w["steps"] * w["passes"] for w in ledger.work.values())


def largest_norm(norm: str, eps: float, size: int) -> float:
    """The norm that a perturbation of ``size`` pixels may have after rounding."""
    return eps * (1 + 1e-6) + _PIXEL_ROUNDING * (1 if norm == "linf" else size**0.5)


def _norm(delta: np.ndarray, norm: str) -> np.ndarray:
    """The norm of each of [n, H, W, C]."""
    flat = delta.reshape(len(delta), -1).astype(np.float64)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))
