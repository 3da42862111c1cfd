"""The attacks of AutoAttack behind one interface, ``Method``.

A method advances a batch of independent runs by one step. A run is one restart, or one target
class, of one image. All that a run needs is in its row of ``Problem`` and of the state, so any row
of the batch can be replaced at any time, and the outcome of a run does not depend on the others.
Its random numbers follow from the seed, the attack, the image's index and the number of the run.
"""

import abc
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks import apgd, apgd_l1, fab, square
from vit_at.attacks.autoattack.settings import Settings
from vit_at.attacks.losses import is_correct, margin
from vit_at.attacks.norms import random_directions
from vit_at.attacks.threat import Threat

Array = jax.Array
_LOSSES = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "targeted dlr"}
_TIE = np.finfo(np.float32).tiny


class Problem(NamedTuple):
    """The runs of a batch.

    images: [b, H, W, C]; labels, targets: [b] classes; index: [b], the image's place in the data;
    run: [b], number of the run: all restarts of a target before the next target.
    """

    images: Array
    labels: Array
    targets: Array
    index: Array
    run: Array


class Outcome(NamedTuple):
    """steps: [b], done so far; success: [b] bool; adversarial: [b, H, W, C], for successes only."""

    steps: Array
    success: Array
    adversarial: Array


class Context(NamedTuple):
    """What all runs share.

    logits_fn: images -> logits, or (images, keys [b]) -> logits; eps: in pixel units.
    """

    logits_fn: Callable[..., Array]
    seed: Array
    eps: Array


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """One attack. Hashable, as a static argument of compiled programs.

    restarts, targets: numbers of them; steps: of one run; passes: cost of a step in forward passes,
    a backward pass counting as 2. worst: a success does not end the run, whose adversarial image
    of the highest loss is kept.
    """

    name: str
    norm: str
    restarts: int
    targets: int
    steps: int
    passes: int
    worst: bool

    @property
    def runs(self) -> int:
        """Number of runs for an image that withstands all of them."""
        return self.restarts * self.targets

    def rank(self, run: Any) -> Any:
        """The rank of a run's target class, from 0."""
        return run // self.restarts

    def ended(self, steps: Array, success: Array) -> Array:
        """Whether a success counts now [b]: at once, or if the worst image is kept at the end."""
        return success & (steps >= self.steps) if self.worst else success

    @property
    def targeted(self) -> bool:
        """Whether each run has a target class."""
        return self.name.endswith("-t")

    @abc.abstractmethod
    def start(self, context: Context, problem: Problem) -> Any:
        """The state of all runs before their first step; does not evaluate the model."""

    @abc.abstractmethod
    def advance(self, context: Context, problem: Problem, state: Any) -> Any:
        """The state after one more step."""

    @abc.abstractmethod
    def read(self, context: Context, state: Any) -> Outcome:
        """The outcome so far."""

    def threat(self, context: Context) -> Threat:
        """What APGD and Square may do; their first step evaluates the start."""
        return Threat(self.norm, context.eps, steps=self.steps - 1)

    def run_keys(self, context: Context, problem: Problem) -> Array:
        """One key for each run, [b]."""
        key = jax.random.fold_in(jax.random.key(context.seed), zlib.crc32(self.name.encode()))
        fold = jax.vmap(lambda index, run: jax.random.fold_in(jax.random.fold_in(key, index), run))
        return fold(problem.index, problem.run)

    def step_keys(self, context: Context, problem: Problem, step: Array) -> Array:
        """One key for each run in its step [b]."""
        return jax.vmap(jax.random.fold_in)(self.run_keys(context, problem), step)

    def directions(self, context: Context, problem: Problem) -> Array:
        """A random direction for the start of each run, [b, H, W, C]."""
        keys = self.run_keys(context, problem)
        return random_directions(keys, problem.images.shape[1:], self.norm)


def make(name: str, settings: Settings, num_classes: int) -> Method:
    """An attack with the official parameters; custom lists have those of the standard version."""
    budget = settings.budget
    runs = (settings.restarts(name), settings.targets(name, num_classes))
    worst = settings.keep == "worst"
    if name.startswith("apgd"):
        samples = budget.samples if settings.randomised else 0
        schedule = apgd_l1.phases(budget.iterations, settings.in_phases)
        own = (3 * max(samples, 1), worst, samples)
        if settings.norm == "l1":
            steps = budget.iterations + len(schedule)
            return ApgdL1(name, "l1", *runs, steps, *own, schedule)
        return Apgd(name, settings.norm, *runs, 1 + budget.iterations, *own, budget.rho)
    if name.startswith("fab"):
        passes = 4 if name == "fab-t" else 2 + 2 * num_classes
        return Fab(name, settings.norm, *runs, budget.iterations, passes, worst=False)
    return Square(name, settings.norm, *runs, 1 + budget.queries, 1, worst)


@dataclasses.dataclass(frozen=True)
class _AnyApgd(Method):
    """APGD on one of three losses. samples: draws of a randomised model; 0: the model has none."""

    samples: int

    def evaluator(self, context: Context, problem: Problem, step: Array) -> apgd.Evaluate:
        """The loss, its gradient and whether points are correct, as in the step [b] of a run."""
        keys = None
        if self.samples:
            step_keys = self.step_keys(context, problem, step)
            draws = jax.vmap(lambda key: jax.random.split(key, self.samples))(step_keys)
            keys = jnp.swapaxes(draws, 0, 1)

        def evaluate(points):
            labels, targets, loss = problem.labels, problem.targets, _LOSSES[self.name]
            return apgd.loss_and_gradient(context.logits_fn, loss, points, labels, targets, keys)

        return evaluate


@dataclasses.dataclass(frozen=True)
class Apgd(_AnyApgd):
    """APGD in linf and l2. rho: see ``Budget``."""

    rho: float

    def start(self, context, problem):
        directions = self.directions(context, problem)
        return apgd.start(problem.images, directions, self.threat(context))

    def advance(self, context, problem, state):
        evaluate = self.evaluator(context, problem, state.iteration + 1)
        threat = self.threat(context)
        return apgd.advance(evaluate, problem.images, state, threat, self.rho)[0]

    def read(self, context, state):
        steps = state.iteration + 1
        return Outcome(steps, self.ended(steps, ~state.robust), state.adversarial)


@dataclasses.dataclass(frozen=True)
class ApgdL1(_AnyApgd):
    """APGD in l1. schedule: its phases."""

    schedule: tuple[apgd_l1.Phase, ...]

    def start(self, context, problem):
        directions, threat = self.directions(context, problem), self.threat(context)
        return apgd_l1.start(problem.images, directions, threat, self.schedule)

    def advance(self, context, problem, state):
        evaluate = self.evaluator(context, problem, state.evaluation)
        threat = self.threat(context)
        return apgd_l1.advance(evaluate, problem.images, state, threat, self.schedule)[0]

    def read(self, context, state):
        steps = state.evaluation
        return Outcome(steps, self.ended(steps, ~state.robust), state.adversarial)


@dataclasses.dataclass(frozen=True)
class Fab(Method):
    """FAB, or FAB-T towards the target classes. It looks for the nearest adversarial image, so it
    ends at the first one in the ball.
    """

    def start(self, context, problem):
        images = problem.images
        if self.restarts == 1:
            return fab.start(images, images)
        directions = self.directions(context, problem)
        restart = fab.random_point(images, directions, self.norm, context.eps)
        again = problem.run % self.restarts > 0
        return fab.start(images, apgd.where(again, restart, images))

    def advance(self, context, problem, state):
        logits_fn, labels = context.logits_fn, problem.labels

        def linearise(points):
            if self.targeted:
                return fab.towards_target(logits_fn, points, labels, problem.targets)
            return fab.towards_nearest(logits_fn, points, labels, self.norm)

        def correct_at(points):
            return is_correct(logits_fn(points), labels)

        return fab.advance(linearise, correct_at, problem.images, state, self.norm)

    def read(self, context, state):
        return Outcome(state.iteration, state.distance <= context.eps, state.adversarial)


@dataclasses.dataclass(frozen=True)
class Square(Method):
    """Square."""

    def start(self, context, problem):
        shape = problem.images.shape[1:]
        draw = jax.vmap(lambda key: square.draw_initial(key, shape, self.norm))
        uniforms = draw(self.run_keys(context, problem))
        return square.start(problem.images, uniforms, self.threat(context))

    def advance(self, context, problem, state):
        shape = problem.images.shape[1:]
        keys = self.step_keys(context, problem, state.queries + 1)
        uniforms = jax.vmap(lambda key: square.draw_proposal(key, shape, self.norm))(keys)

        def margin_fn(points):
            logits = context.logits_fn(points)
            value = margin(logits, problem.labels)
            # A tie that counts as correct is no success.
            correct = is_correct(logits, problem.labels)
            value = jnp.where(correct, jnp.maximum(value, _TIE), value)
            # A comparison with NaN is false, and would keep the image.
            return jnp.where(jnp.isfinite(logits).all(-1), value, -jnp.inf)

        return square.advance(margin_fn, problem.images, state, uniforms, self.threat(context))

    def read(self, context, state):
        return Outcome(state.queries, self.ended(state.queries, state.margin <= 0), state.best)
