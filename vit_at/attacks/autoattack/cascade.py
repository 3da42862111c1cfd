"""The attacks of AutoAttack one after the other, each on the images that are still robust.

A success counts only if a separate forward pass confirms it, and all successes are verified again
at the end. The ledger is written after every round, unless that would take over a twentieth of the
time.
"""

import time

import jax
import numpy as np

from vit_at.attacks.autoattack.checks import Classifier, read
from vit_at.attacks.autoattack.ledger import BROKEN, WITHSTOOD, Ledger, Store
from vit_at.attacks.autoattack.methods import Method
from vit_at.attacks.autoattack.packing import Finished, Packing, Source
from vit_at.attacks.autoattack.programs import cut_for
from vit_at.attacks.autoattack.settings import Settings
from vit_at.attacks.losses import is_correct
from vit_at.attacks.norms import largest_size, sizes
from vit_at.console import Progress
from vit_at.distributed import processes

_WRITING_SHARE = 0.05  # share of the time that writing the ledger may take


class Cascade:
    """Runs attacks on the images of a source and keeps the ledger."""

    def __init__(
        self,
        methods: list[Method],
        source: Source,
        classify: Classifier,
        ledger: Ledger,
        store: Store,
        settings: Settings,
        progress: Progress,
    ):
        self._methods, self._source, self._classify = methods, source, classify
        self._ledger, self._store, self._settings = ledger, store, settings
        self._progress, self._last_save = progress, time.monotonic()
        self._save_seconds = 0.0
        self._resumed_with = _passes(ledger)

    def run(self) -> None:
        """Runs the attacks that the ledger does not hold yet."""
        ledger = self._ledger
        while ledger.stage < len(self._methods) and ledger.attacked.any():
            method = self._methods[ledger.stage]
            self._attack(method)
            ledger.stage += 1
            self._save()
            robust = ledger.robust_after()[method.name]
            self._progress.say(f"{method.name}: {robust.mean():.2%} robust ({robust.sum()} images)")

    def _attack(self, method: Method) -> None:
        ledger = self._ledger
        model, flop = self._classify.model, self._classify.flop
        packing = Packing(method, model, flop, self._source, self._settings)
        if ledger.progress is not None:
            packing.restore(ledger.progress)
        else:
            packing.begin(np.flatnonzero(ledger.attacked))
        unconfirmed = ledger.work.get(method.name, {}).get("unconfirmed", 0)
        for finished in packing.rounds():
            unconfirmed += self._record(packing, finished)
            ledger.work[method.name] = packing.work | {"passes": method.passes}
            ledger.work[method.name]["unconfirmed"] = unconfirmed
            self._save_now_and_then(packing)
            self._show(method, packing)

    def _record(self, packing: Packing, finished: list[Finished]) -> int:
        """Enters outcomes into the ledger; returns the number of successes that a forward pass does
        not confirm. Such an image continues with its next run.
        """
        ledger, column = self._ledger, self._ledger.stage
        successes = [f for f in finished if f.adversarial is not None]
        flaws, norms = {}, {}
        if successes:
            places = np.array([f.image for f in successes])
            points = np.stack([f.adversarial for f in successes])
            moved, outside = self._moved(places, points)
            flaws = self._flaws(places, points, outside, draw=1 + column)
            norms = dict(zip(places, moved, strict=True))
        for end in finished:
            if end.image in flaws and packing.continue_with_next_run(end):
                continue
            broken = end.adversarial is not None and end.image not in flaws
            first = broken and ledger.robust_at(end.image)
            ledger.outcome[end.image, column] = BROKEN if broken else WITHSTOOD
            if first:
                ledger.found[end.image] = end.adversarial
                ledger.run[end.image], ledger.step[end.image] = end.run, end.step
                ledger.norm[end.image] = norms[end.image]
        return len(flaws)

    def verify(self) -> dict[int, str]:
        """Verifies the stored adversarial images; returns {image: reason} for those that fail.

        A randomised model draws as it did when the success was confirmed.
        """
        processes.barrier("ledger written")  # the images are read back from disk
        flaws, size = {}, self._settings.batch_size
        draws = 1 + np.argmax(self._ledger.outcome == BROKEN, 1)
        for places, points in self._store.parts():
            for begin in range(0, len(places), size):
                some = slice(begin, begin + size)
                batch = places[some], points[some]
                _, outside = self._moved(*batch)
                flaws |= self._flaws(*batch, outside, draws[places[some]])
        return dict(sorted(flaws.items()))

    def _moved(self, places: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sizes [n] of the perturbations of the points [n, H, W, C], and whether they are outside
        the ball. Each process reads the images of its share.
        """
        moved, outside = np.zeros(len(places), np.float32), np.zeros(len(places), bool)
        mine = np.arange(jax.process_index(), len(places), jax.process_count())
        if len(mine):
            delta = points[mine] - read(self._source.images, places[mine])
            found = sizes(delta, self._settings.norm)
            allowed = largest_size(self._settings.eps, delta[0].size, self._settings.norm)
            moved[mine], outside[mine] = found, ~(found <= allowed)
        return processes.sum_of(moved), processes.any_of(outside)

    def _flaws(
        self,
        places: np.ndarray,
        points: np.ndarray,
        outside: np.ndarray,
        draw: int | np.ndarray,
    ) -> dict[int, str]:
        """{image: reason} for the points [n, H, W, C] that are not adversarial for their image.

        outside: of ``_moved``; draw: a number, or one for each point; fixes the keys of a
          randomised model.
        """
        settings = self._settings
        of_device = cut_for(settings.mesh).most_slots or settings.batch_size
        width = min(of_device * settings.mesh.size, settings.batch_size)
        logits = self._classify(points, width, places, draw)
        reasons = {
            "outside [0, 1]": (points.min((1, 2, 3)) < 0) | (points.max((1, 2, 3)) > 1),
            "outside the ball": outside,
            "classified correctly": is_correct(logits, self._source.labels[places], np),
        }
        return {
            int(place): reason
            for reason, wrong in reversed(reasons.items())
            for place in places[wrong]
        }

    def _save(self, packing: Packing | None = None) -> None:
        """Saves the outcomes, and the runs in progress if there are some."""
        began = time.monotonic()
        self._ledger.progress = packing.snapshot() if packing else None
        self._store.save(self._ledger)
        self._ledger.progress = None
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - began

    def _save_now_and_then(self, packing: Packing) -> None:
        """Saves, unless that would take over a twentieth of the time."""
        since = time.monotonic() - self._last_save
        due = since >= self._save_seconds / _WRITING_SHARE
        if self._store.keeps and processes.agree(due):
            self._save(packing)

    def _show(self, method: Method, packing: Packing) -> None:
        """Progress in forward passes; their total falls with every image that breaks."""
        done = _passes(self._ledger) - self._resumed_with
        left = packing.steps_left() * method.passes
        later = self._methods[self._ledger.stage + 1 :]
        left += int(self._ledger.attacked.sum()) * sum(m.runs * m.steps * m.passes for m in later)
        text = f"{method.name}: {packing.unfinished()} images under attack, "
        text += f"{self._ledger.robust.mean():.2%} still robust"
        self._progress.update(text, done=done, total=done + left)


def _passes(ledger: Ledger) -> int:
    """Forward passes of single images so far."""
    return sum(w["steps"] * w["passes"] for w in ledger.work.values())
