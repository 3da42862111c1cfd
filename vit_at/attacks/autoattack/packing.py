"""Keeps the batch of one attack full of unfinished runs, as a server batches requests.

A round advances all slots of the batch for some steps, and ends early once a quarter of them have
finished (``programs``). Then the host replaces finished runs by waiting ones: the next run of an
image that withstood one, or the next image. So devices waste at most the rest of a round on a
finished run. When few images are left, the batch shrinks.

Which run is in which slot follows from the outcomes alone, never from the clock, so an attack that
is interrupted and restored from ``snapshot`` repeats the same numbers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_at.attacks.autoattack.checks import read
from vit_at.attacks.autoattack.methods import Context, Method, Problem
from vit_at.attacks.autoattack.programs import Program, Slots, cut_for
from vit_at.attacks.autoattack.settings import Settings
from vit_at.distributed import processes, sharding

EMPTY = -1


class Finished(NamedTuple):
    """The end of one attack on an image; adversarial: [H, W, C], None if the image withstood."""

    image: int
    run: int
    step: int
    adversarial: np.ndarray | None


class Waiting(NamedTuple):
    """A run that is in no slot yet."""

    image: int
    run: int


class Source(NamedTuple):
    """The data: images [N, H, W, C], read when needed; labels [N]; ranking [N, k]: the classes with
    the highest clean logits, highest first.
    """

    images: Any
    labels: np.ndarray
    ranking: np.ndarray


class Snapshot(NamedTuple):
    """An attack between two rounds.

    runs: which run is in which slot, its steps, the waiting runs and the work so far, the same on
    every process; slots: the state of this process's slots.
    """

    runs: dict[str, np.ndarray]
    slots: dict[str, np.ndarray]


class Packing:
    """One attack on some images; see the module's docstring.

    model: a ``jax.tree_util.Partial``, the logits function with its parameters; flop: of a forward
      pass of one image.
    work: steps so far, {"steps": of unfinished runs, "computed": of all slots}.
    """

    def __init__(self, method: Method, model: Any, flop: float, source: Source, settings: Settings):
        self.method, self._source, self._mesh = method, source, settings.mesh
        self._flop = flop
        self._program = Program(method, settings.mesh, settings.randomised)
        self._context = Context(model, np.uint32(settings.seed), np.float32(settings.eps))
        self._cut, self._batch_size = cut_for(settings.mesh), settings.batch_size
        if self._cut.most_slots:
            self._batch_size = min(self._batch_size, self._cut.most_slots * self._mesh.size)
        self.work = {"steps": 0, "computed": 0}
        self.waiting: list[Waiting] = []
        self._image = self._run = self._steps = np.zeros(0, int)
        self._slots: Any = None  # Slots, once there are images

    def begin(self, images: np.ndarray) -> None:
        """Starts the attack on the images at some places [n] of the source."""
        self.waiting = [Waiting(int(i), 0) for i in images]
        self._open(self._width_for(len(self.waiting)))

    def unfinished(self) -> int:
        """Number of images that are in a slot or waiting."""
        return len(self.waiting) + int((self._image != EMPTY).sum())

    def rounds(self) -> Iterator[list[Finished]]:
        """Runs until no image is left; yields the images that each round finished."""
        while self.unfinished():
            self._shrink()
            self._fill()
            yield self._round()

    def continue_with_next_run(self, end: Finished) -> bool:
        """Queues the next run of an image whose success was not confirmed; False if it has none."""
        if end.run + 1 >= self.method.runs:
            return False
        self.waiting.insert(0, Waiting(end.image, end.run + 1))
        return True

    def steps_left(self) -> int:
        """Steps still to do if no further image is broken."""
        method = self.method
        whole = sum(method.runs - w.run for w in self.waiting) * method.steps
        taken = self._image != EMPTY
        further = (method.runs - self._run[taken]) * method.steps - self._steps[taken]
        return whole + int(further.sum())

    def _round(self) -> list[Finished]:
        forward_only = self.method.passes == 1
        limit = self._cut.forward_steps if forward_only else self._cut.gradient_steps
        slots, outcome, counts = self._program.advance(self._context, self._slots, np.int32(limit))
        self._slots = slots
        found = (slots.active, outcome.steps, outcome.success, counts)
        running, steps, success, counts = sharding.gather(found)
        taken = self._image != EMPTY
        self.work["steps"] += int((steps - self._steps)[taken].sum())
        self.work["computed"] += int(counts.sum()) * len(taken) // self._mesh.size
        self._steps = np.where(taken, steps, 0)
        broken, points = np.flatnonzero(taken & success), {}
        if len(broken):
            rows = sharding.gather_rows(outcome.adversarial, broken, self._mesh)
            points = dict(zip(broken, rows, strict=True))
        ended = []
        for slot in np.flatnonzero(taken & ~running):
            image, run = int(self._image[slot]), int(self._run[slot])
            if not success[slot] and run + 1 < self.method.runs:
                self.waiting.insert(0, Waiting(image, run + 1))
            else:
                ended.append(Finished(image, run, int(steps[slot]), points.get(slot)))
            self._image[slot] = EMPTY
        return ended

    def _width_for(self, count: int) -> int:
        """The smallest of the batches that hold ``count`` runs, at most the batch size."""
        width = unit = self._cut.slots * self._mesh.size
        while width < count:
            width = 2 * width if self._cut.doubled else width + unit
        return min(width, self._batch_size)

    def _shrink(self) -> None:
        """Narrows the batch if that saves more than the compilation costs."""
        width, count = len(self._image), self.unfinished()
        narrow = self._width_for(count)
        if not count or narrow >= width:
            return
        saved = (width - narrow) * self.method.passes * self.steps_left() / count
        if saved * self._flop < self._cut.worth_compiling:
            return
        keep = np.argsort(self._image == EMPTY, kind="stable")[:narrow]
        mine = keep[sharding.my_part(narrow, self._mesh)]
        slots = jax.tree.map(lambda x: x[mine], sharding.gather(self._slots))
        self._image, self._run = self._image[keep], self._run[keep]
        self._steps = self._steps[keep]
        self._slots = sharding.split_batch(slots, self._mesh)

    def _open(self, width: int) -> None:
        """Empty slots."""
        self._image, self._run = np.full(width, EMPTY), np.zeros(width, int)
        self._steps = np.zeros(width, int)
        problem = self._problem()
        shapes = jax.eval_shape(self.method.start, self._context, problem)
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        slots = Slots(problem, state, np.zeros(len(problem.labels), bool))
        self._slots = sharding.split_batch(slots, self._mesh)

    def _fill(self) -> None:
        """Starts waiting runs in empty slots."""
        empty = np.flatnonzero(self._image == EMPTY)[: len(self.waiting)]
        if not len(empty):
            return
        entering, self.waiting = self.waiting[: len(empty)], self.waiting[len(empty) :]
        taken = np.zeros(len(self._image), bool)
        taken[empty] = True
        self._image[empty] = [w.image for w in entering]
        self._run[empty] = [w.run for w in entering]
        self._steps[empty] = 0
        mine = sharding.my_part(len(taken), self._mesh)
        entering, taken = sharding.split_batch((self._problem(taken), taken[mine]), self._mesh)
        self._slots = self._program.admit(self._context, self._slots, entering, taken)

    def _problem(self, wanted: np.ndarray | None = None) -> Problem:
        """The runs of this process's slots, with images, labels and targets of the wanted ones
        [width] (None: all). Other images are not read.
        """
        mine = sharding.my_part(len(self._image), self._mesh)
        image, run, count = self._image[mine], self._run[mine], mine.stop - mine.start
        images = np.zeros((count, *self._source.images.shape[1:]), np.float32)
        labels, targets = np.zeros(count, np.int32), np.zeros(count, np.int32)
        rows = np.flatnonzero(image != EMPTY if wanted is None else wanted[mine])
        if len(rows):
            places = image[rows]
            images[rows] = read(self._source.images, places)
            labels[rows] = self._source.labels[places]
            if self.method.targeted:  # column 0 is the predicted class
                targets[rows] = self._source.ranking[places, 1 + self.method.rank(run[rows])]
        index = np.maximum(image, 0).astype(np.uint32)
        return Problem(images, labels, targets, index, run.astype(np.int32))

    def snapshot(self) -> Snapshot:
        """All that ``restore`` needs to resume with the same numbers."""
        leaves = jax.tree.leaves((self._slots.active, self._slots.state))
        runs = {
            "image": self._image.copy(),
            "run": self._run.copy(),
            "steps": self._steps.copy(),
            "waiting": np.array(self.waiting, int).reshape(-1, 2),
            "work": np.array([self.work["steps"], self.work["computed"]]),
        }
        return Snapshot(runs, {str(i): sharding.my_rows(x) for i, x in enumerate(leaves)})

    def restore(self, snapshot: Snapshot) -> None:
        """Resumes from a snapshot. The runs that were in a slot restart if the batch size or the
        number of devices does not fit its width, or the slots' state on a process is not that of
        this program.
        """
        saved = snapshot.runs
        self.waiting = [Waiting(int(i), int(r)) for i, r in saved["waiting"]]
        self.work = dict(zip(("steps", "computed"), map(int, saved["work"]), strict=True))
        width = len(saved["image"])
        if width % self._mesh.size == 0 and width <= self._batch_size:
            self._image, self._run, self._steps = (
                saved[name].copy() for name in ("image", "run", "steps")
            )
            problem = self._problem()
            state = jax.eval_shape(self.method.start, self._context, problem)
            active = jax.ShapeDtypeStruct(problem.labels.shape, bool)
            leaves, treedef = jax.tree.flatten((active, state))
            kinds = {str(i): _kind(x) for i, x in enumerate(leaves)}
            if processes.all_of({i: _kind(x) for i, x in snapshot.slots.items()} == kinds):
                active, state = jax.tree.unflatten(treedef, [snapshot.slots[i] for i in kinds])
                slots = Slots(problem, state, active)
                self._slots = sharding.split_batch(slots, self._mesh)
                return
        taken = saved["image"] != EMPTY
        again = zip(saved["image"][taken], saved["run"][taken], strict=True)
        self.waiting = [Waiting(int(i), int(r)) for i, r in again] + self.waiting
        self._open(self._width_for(len(self.waiting)))


def _kind(x: np.ndarray | jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype]:
    return x.shape, x.dtype
