"""Keeps a batch of slots full of unfinished runs, as a server batches requests.

A round advances all slots on the device for some steps, and ends early once some have finished.
Then the host takes their images out and lets the next runs in: the next run of an image that has
withstood one, or a waiting image. A device so never works on a finished image for more than the
rest of a round. When few images are left, the batch shrinks.

Which run is where follows from the images' outcomes alone, never from the clock: a run that is
interrupted and restored from ``snapshot`` repeats the same numbers.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_at.attacks.autoattack import methods
from vit_at.attacks.autoattack.checks import as_batch_function, read
from vit_at.attacks.autoattack.methods import Context, Method, Problem
from vit_at.distributed import sharding

Array = jax.Array
EMPTY = -1


class Cut(NamedTuple):
    """How the work is cut into programs and rounds.

    forward_steps, gradient_steps: of a round, of methods without and with gradients; long enough
      that the host's part in between does not count, and no longer.
    slots: of a device; the width of a batch is a multiple of it.
    most_slots: of a device whose activations stay in its cache, more are slower; None: no limit.
    worth_compiling: forward passes that a narrower batch must save.
    """

    forward_steps: int
    gradient_steps: int
    slots: int
    most_slots: int | None
    worth_compiling: int


_ON_A_CPU = Cut(50, 8, slots=1, most_slots=8, worth_compiling=12_000)
_ON_AN_ACCELERATOR = Cut(200, 25, slots=8, most_slots=None, worth_compiling=1_000_000)


class Finished(NamedTuple):
    """The end of an image in one attack. adversarial [H, W, C] or None; run and step of the end."""

    image: int
    run: int
    step: int
    adversarial: np.ndarray | None


class Waiting(NamedTuple):
    """A run that no slot has taken yet."""

    image: int
    run: int


class Source(NamedTuple):
    """All images [N, H, W, C], read when they are needed; labels [N]; ranking [N, k]: the classes
    with the highest clean logits, the first one first.
    """

    images: Any
    labels: np.ndarray
    ranking: np.ndarray


class Programs:
    """The compiled parts of one method; each compiles once for a width of the batch.

    admit: lets runs into some slots; advance: a round of steps.
    """

    def __init__(self, method: Method, mesh: Mesh, randomised: bool):
        split, whole = sharding.SPLIT, sharding.WHOLE
        self.method = method

        def context_of(model, seed, eps):
            return Context(as_batch_function(model, randomised), seed, eps)

        def admit(model, seed, eps, problem, state, active, entering, taken):
            fresh = method.start(context_of(model, seed, eps), entering)
            problem = _choose(taken, entering, problem)
            return problem, _choose(taken, fresh, state), active | taken

        def advance(model, seed, eps, problem, state, active, limit):
            context = context_of(model, seed, eps)
            patience, began = active.shape[0] // 4, active.sum()

            def unfinished(carry):
                count, _, running = carry
                left = running.sum()
                return (count < limit) & (left > 0) & (began - left <= patience)

            def step(carry):
                count, state, running = carry
                moved = method.advance(context, problem, state)
                state = _choose(running, moved, state)
                outcome = method.read(context, state)
                running &= ~outcome.success & (outcome.steps < method.steps)
                return count + 1, state, running

            count, state, running = jax.lax.while_loop(
                unfinished, step, (jnp.zeros((), jnp.int32), state, active)
            )
            outcome = method.read(context, state)
            return state, running, outcome, jnp.full(1, count)

        scalars = (whole, whole, whole)
        slots = (split, split, split)
        self.admit = _compile(admit, mesh, (*scalars, *slots, split, split), donate=(3, 4, 5))
        self.advance = _compile(advance, mesh, (*scalars, *slots, whole), donate=(4,))


@functools.lru_cache(maxsize=64)
def programs(
    name: str, settings: tuple[tuple[str, Any], ...], mesh: Mesh, randomised: bool
) -> Programs:
    """The programs of ``methods.make(name, **settings)``, compiled once in a process."""
    return Programs(methods.make(name, **dict(settings)), mesh, randomised)


def _compile(function, mesh, specs, donate=()):
    mapped = sharding.map_shards(function, mesh, specs)
    return jax.jit(mapped, donate_argnums=donate)


def _choose(condition: Array, yes: Any, no: Any) -> Any:
    """Slot by slot: condition [b], the others trees of [b, ...]."""

    def choose(a, b):
        return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, yes, no)


class Packing:
    """One attack on some images: see the module's docstring.

    model: what ``Programs`` calls, with its parameters as a tree of arrays.
    work: image evaluations so far, {"steps": of unfinished runs, "computed": of all slots}.
    """

    def __init__(
        self,
        programs: Programs,
        model: Any,
        source: Source,
        mesh: Mesh,
        *,
        seed: int,
        eps: float,
        batch_size: int,
    ):
        self.method, self._programs, self._mesh = programs.method, programs, mesh
        self._shared = (model, np.uint32(seed), np.float32(eps))
        self._source = source
        self._cut = _ON_A_CPU if jax.default_backend() == "cpu" else _ON_AN_ACCELERATOR
        at_most = self._cut.most_slots
        self._batch_size = min(batch_size, at_most * mesh.size) if at_most else batch_size
        self.work = {"steps": 0, "computed": 0}
        self.waiting: list[Waiting] = []
        self._image = self._run = self._steps = np.zeros(0, int)
        self._slots: Any = None  # problem, state, active

    def begin(self, images: np.ndarray) -> None:
        """Takes the images [n], places in the source, that the attack is to run on."""
        self.waiting = [Waiting(int(i), 0) for i in images]
        self._open(self._width_for(len(self.waiting)))

    def unfinished(self) -> int:
        """How many images are in a slot or waiting."""
        return len(self.waiting) + int((self._image != EMPTY).sum())

    def rounds(self) -> Iterator[list[Finished]]:
        """Runs until no image is left; yields those that each round has finished."""
        while self.unfinished():
            self._shrink()
            self._fill()
            yield self._round()

    def steps_left(self) -> int:
        """Steps of runs still to do if no image falls."""
        method = self.method
        whole = sum(method.runs - w.run for w in self.waiting) * method.steps
        taken = self._image != EMPTY
        further = (method.runs - self._run[taken]) * method.steps - self._steps[taken]
        return whole + int(further.sum())

    def _round(self) -> list[Finished]:
        problem, state, active = self._slots
        forward_only = self.method.passes == 1
        limit = self._cut.forward_steps if forward_only else self._cut.gradient_steps
        state, running, outcome, counts = self._programs.advance(
            *self._shared, problem, state, active, np.int32(limit)
        )
        self._slots = (problem, state, running)
        running, steps, success = sharding.gather((running, outcome.steps, outcome.success))
        taken = self._image != EMPTY
        self.work["steps"] += int((steps - self._steps)[taken].sum())
        self.work["computed"] += (
            int(np.sum(sharding.gather(counts))) * len(taken) // self._mesh.size
        )
        self._steps = np.where(taken, steps, 0)
        fallen = taken & success
        adversarial = sharding.gather(outcome.adversarial) if fallen.any() else None
        ended = []
        for slot in np.flatnonzero(taken & ~running):
            image, run = int(self._image[slot]), int(self._run[slot])
            if success[slot]:
                row = adversarial[slot].copy()
                ended.append(Finished(image, run, int(steps[slot]), row))
            elif run + 1 < self.method.runs:
                self.waiting.insert(0, Waiting(image, run + 1))
            else:
                ended.append(Finished(image, run, int(steps[slot]), None))
            self._image[slot] = EMPTY
        return ended

    def _width_for(self, count: int) -> int:
        """The narrowest batch that holds ``count`` runs, at most the batch size."""
        unit = self._cut.slots * self._mesh.size
        return min(self._batch_size, -(-max(count, 1) // unit) * unit)

    def _shrink(self) -> None:
        """Narrows the batch where that saves more than compiling for it costs."""
        width, count = len(self._image), self.unfinished()
        narrow = self._width_for(count)
        if not count or narrow >= width:
            return
        saved = (width - narrow) * self.method.passes * self.steps_left() / count
        if saved < self._cut.worth_compiling:
            return
        keep = np.argsort(self._image == EMPTY, kind="stable")[:narrow]
        self._restore_slots(
            jax.tree.map(lambda x: x[keep], sharding.gather(self._slots)),
            self._image[keep],
            self._run[keep],
            self._steps[keep],
        )

    def _open(self, width: int) -> None:
        """Empty slots."""
        self._image, self._run = np.full(width, EMPTY), np.zeros(width, int)
        self._steps = np.zeros(width, int)
        problem = sharding.split_whole(self._problem(), self._mesh)
        context = Context(None, *self._shared[1:])
        shapes = jax.eval_shape(functools.partial(self.method.start, context), self._problem())
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        state = sharding.split_whole(state, self._mesh)
        active = sharding.split_whole(np.zeros(width, bool), self._mesh)
        self._slots = (problem, state, active)

    def _fill(self) -> None:
        """Lets waiting runs into empty slots."""
        empty = np.flatnonzero(self._image == EMPTY)[: len(self.waiting)]
        if not len(empty):
            return
        entering, self.waiting = self.waiting[: len(empty)], self.waiting[len(empty) :]
        taken = np.zeros(len(self._image), bool)
        taken[empty] = True
        self._image[empty] = [w.image for w in entering]
        self._run[empty] = [w.run for w in entering]
        self._steps[empty] = 0
        entering, taken = sharding.split_whole((self._problem(taken), taken), self._mesh)
        self._slots = self._programs.admit(*self._shared, *self._slots, entering, taken)

    def _problem(self, wanted: np.ndarray | None = None) -> Problem:
        """The rows of the slots as they are assigned now; images only of the wanted slots."""
        width, shape = len(self._image), self._source.images.shape[1:]
        images = np.zeros((width, *shape), np.float32)
        labels, targets = np.zeros(width, np.int32), np.zeros(width, np.int32)
        rows = np.flatnonzero(self._image != EMPTY if wanted is None else wanted)
        if len(rows):
            places = self._image[rows]
            images[rows] = read(self._source.images, places)
            labels[rows] = self._source.labels[places]
            if self.method.targeted:  # the top class itself is no target
                targets[rows] = self._source.ranking[places, 1 + self._run[rows]]
        index = np.maximum(self._image, 0).astype(np.uint32)
        return Problem(images, labels, targets, index, self._run.astype(np.int32))

    def snapshot(self) -> dict[str, np.ndarray]:
        """Everything that ``restore`` needs to go on in the same way."""
        _, state, active = sharding.gather(self._slots)
        leaves = {f"state/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        return leaves | {
            "active": np.asarray(active),
            "image": self._image.copy(),
            "run": self._run.copy(),
            "steps": self._steps.copy(),
            "waiting": np.array(self.waiting, int).reshape(-1, 2),
            "work": np.array([self.work["steps"], self.work["computed"]]),
        }

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Goes on from a snapshot; with a batch size or on a number of devices that its width does
        not suit, the runs that were in a slot start anew.
        """
        self.waiting = [Waiting(int(i), int(r)) for i, r in saved["waiting"]]
        self.work = dict(zip(("steps", "computed"), map(int, saved["work"]), strict=True))
        taken = saved["image"] != EMPTY
        width = len(taken)
        if width % self._mesh.size or width > self._batch_size:
            again = zip(saved["image"][taken], saved["run"][taken], strict=True)
            self.waiting = [Waiting(int(i), int(r)) for i, r in again] + self.waiting
            self._open(self._width_for(len(self.waiting)))
            return
        self._open(width)
        treedef = jax.tree.structure(self._slots[1])
        leaves = [saved[f"state/{i}"] for i in range(treedef.num_leaves)]
        self._image, self._run = saved["image"].copy(), saved["run"].copy()
        slots = (self._problem(), jax.tree.unflatten(treedef, leaves), saved["active"])
        self._restore_slots(slots, saved["image"], saved["run"], saved["steps"])

    def _restore_slots(self, slots, image, run, steps) -> None:
        self._image, self._run, self._steps = image.copy(), run.copy(), steps.copy()
        self._slots = sharding.split_whole(slots, self._mesh)
