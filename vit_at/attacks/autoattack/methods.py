"""The attacks of AutoAttack in one shape: what packing needs to run them slot by slot.

A ``Method`` advances a batch of independent runs by one step. A run is one restart or one target
class of one image, and everything it needs is in its row of ``Problem`` and of the state: so a slot
of the batch can take another run at any time, and a run's outcome does not depend on its
neighbours. Its random numbers are drawn from the seed, the attack, the image's place and the run.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_at.attacks import apgd, fab, square
from vit_at.attacks.losses import best_wrong_class, pick
from vit_at.errors import UserError, nearest

Array = jax.Array
ITERATIONS, QUERIES, TARGETS, SAMPLES = 100, 5000, 9, 20
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_RESTARTS = {"plus": {"apgd-ce": 5, "apgd-dlr": 5, "fab": 5}}
_CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}


class Problem(NamedTuple):
    """The runs of a batch. images [b, H, W, C]; labels, targets (classes), index (the image's place
    in the evaluation) and run (restart or rank of the target) are [b]; seed and eps are scalars.
    """

    images: Array
    labels: Array
    targets: Array
    index: Array
    run: Array


class Outcome(NamedTuple):
    """steps [b]: done; success [b] bool; adversarial [b, H, W, C], where there is success."""

    steps: Array
    success: Array
    adversarial: Array


class Context(NamedTuple):
    """What all runs of an evaluation share; logits_fn: (images, keys [b] or None) -> logits."""

    logits_fn: Callable[[Array, Array | None], Array]
    seed: Array
    eps: Array


@dataclasses.dataclass(frozen=True)
class Method:
    """One attack.

    runs: for an image that withstands all of them; steps: of one run; passes: cost of a step in
    forward passes, a backward pass counting 2.
    start: (Context, Problem) -> state, without a model evaluation.
    advance: (Context, Problem, state) -> state.
    read: (Context, state) -> Outcome.
    """

    name: str
    runs: int
    steps: int
    passes: int
    targeted: bool
    start: Callable[[Context, Problem], Any]
    advance: Callable[[Context, Problem, Any], Any]
    read: Callable[[Context, Any], Outcome]


def parse(attacks: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """A version's attacks, or those of a custom list, checked.

    Raises:
      UserError: the version or an attack is unknown, or one is named twice.
    """
    if isinstance(attacks, str):
        if attacks in VERSIONS:
            return VERSIONS[attacks]
        attacks = [name.strip() for name in attacks.split(",")]
    for name in attacks:
        if name not in NAMES:
            choices = (*VERSIONS, *NAMES)
            raise UserError(
                f"attack '{name}' is unknown; use {', '.join(VERSIONS)} or a list of "
                f"{', '.join(NAMES)} (nearest: {nearest(str(name), choices, 1)})"
            )
    if not attacks or len(set(attacks)) < len(attacks):
        raise UserError("the attacks must be at least one, each named once; change the list")
    return tuple(attacks)


def for_classes(names: tuple[str, ...], num_classes: int) -> tuple[tuple[str, ...], list[str]]:
    """The attacks that ``num_classes`` allow, and a sentence for each change.

    The DLR loss needs 3 classes and the targeted one 4: with 3, APGD-T gives way to APGD-DLR; with
    2, both are left out. Below 10 classes there are fewer targets than 9.
    """
    kept, notes = [], []
    for name in names:
        if num_classes >= _CLASSES_NEEDED.get(name, 2):
            kept.append(name)
        elif name == "apgd-t" and num_classes == 3 and "apgd-dlr" not in names:
            kept.append("apgd-dlr")
            notes.append("the targeted DLR loss needs 4 classes: apgd-dlr runs in place of apgd-t")
        else:
            notes.append(f"{name} is left out: its loss needs more than {num_classes} classes")
    if any(name.endswith("-t") for name in kept) and num_classes <= TARGETS:
        notes.append(f"{num_classes} classes allow {num_classes - 1} targets, not {TARGETS}")
    if not kept:
        raise UserError(f"no attack of {', '.join(names)} works with {num_classes} classes")
    return tuple(kept), notes


def make(
    name: str,
    version: str,
    norm: str,
    num_classes: int,
    *,
    iterations: int = ITERATIONS,
    queries: int = QUERIES,
) -> Method:
    """An attack with the official parameters of a version (custom lists have the standard ones)."""
    runs = _RESTARTS.get(version, {}).get(name, 1)
    if name.endswith("-t"):
        runs = min(TARGETS, num_classes - 1)
    if name.startswith("apgd"):
        return _apgd(name, runs, norm, iterations, SAMPLES if version == "rand" else 0)
    if name.startswith("fab"):
        return _fab(name, runs, norm, iterations, num_classes)
    return _square(runs, norm, queries)


def run_keys(name: str, context: Context, problem: Problem) -> Array:
    """One key for each run, [b]."""
    key = jax.random.fold_in(jax.random.key(context.seed), zlib.crc32(name.encode()))
    fold = jax.vmap(lambda index, run: jax.random.fold_in(jax.random.fold_in(key, index), run))
    return fold(problem.index, problem.run)


def _apgd(name: str, runs: int, norm: str, iterations: int, samples: int) -> Method:
    loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "targeted dlr"}[name]

    def options(context):
        return apgd.Options(norm, context.eps, iterations)

    def start(context, problem):
        shape = problem.images.shape[1:]
        draw = jax.vmap(lambda key: apgd.random_direction(key, shape, norm))
        directions = draw(run_keys(name, context, problem))
        return apgd.start(problem.images, directions, options(context))

    def advance(context, problem, state):
        keys = None
        if samples:
            step_keys = _step_keys(name, context, problem, state.iteration + 1)
            keys = jnp.swapaxes(jax.vmap(lambda k: jax.random.split(k, samples))(step_keys), 0, 1)

        def logits_fn(points, keys=None):
            return context.logits_fn(points, keys)

        def evaluate(points):
            return apgd.loss_and_gradient(
                logits_fn, loss, points, problem.labels, problem.targets, keys
            )

        return apgd.advance(evaluate, problem.images, state, options(context))[0]

    def read(context, state):
        return Outcome(state.iteration + 1, ~state.robust, state.adversarial)

    passes = 3 * max(samples, 1)
    return Method(name, runs, 1 + iterations, passes, name == "apgd-t", start, advance, read)


def _fab(name: str, runs: int, norm: str, iterations: int, num_classes: int) -> Method:
    targeted = name == "fab-t"
    passes = 4 if targeted else 2 + 2 * num_classes

    def start(context, problem):
        if targeted:
            return fab.start(problem.images, problem.images)
        shape = problem.images.shape[1:]
        draw = jax.vmap(lambda key: apgd.random_direction(key, shape, norm))
        directions = draw(run_keys(name, context, problem))
        restart = fab.random_point(problem.images, directions, norm, context.eps)
        point = apgd.where(problem.run > 0, restart, problem.images)
        return fab.start(problem.images, point)

    def advance(context, problem, state):
        def logits_fn(points):
            return context.logits_fn(points, None)

        def linearise(points):
            if targeted:
                return fab.towards_target(logits_fn, points, problem.labels, problem.targets)
            return fab.towards_nearest(logits_fn, points, problem.labels, norm)

        def correct_at(points):
            return jnp.argmax(logits_fn(points), -1) == problem.labels

        options = fab.Options(norm, iterations)
        return fab.advance(linearise, correct_at, problem.images, state, options)

    def read(context, state):
        return Outcome(state.iteration, state.distance <= context.eps, state.adversarial)

    return Method(name, runs, iterations, passes, targeted, start, advance, read)


def _square(runs: int, norm: str, queries: int) -> Method:
    def options(context):
        return square.Options(norm, context.eps, queries)

    def start(context, problem):
        shape = problem.images.shape[1:]
        draw = jax.vmap(lambda key: square.draw_initial(key, shape, norm))
        uniforms = draw(run_keys("square", context, problem))
        return square.start(problem.images, uniforms, options(context))

    def advance(context, problem, state):
        shape = problem.images.shape[1:]
        keys = _step_keys("square", context, problem, state.queries + 1)
        uniforms = jax.vmap(lambda key: square.draw_proposal(key, shape, norm))(keys)

        def margin_fn(points):
            logits = context.logits_fn(points, None)
            wrong = best_wrong_class(logits, problem.labels)
            return pick(logits, problem.labels) - pick(logits, wrong)

        return square.advance(margin_fn, problem.images, state, uniforms, options(context))

    def read(context, state):
        return Outcome(state.queries, state.margin <= 0, state.best)

    return Method("square", runs, 1 + queries, 1, False, start, advance, read)


def _step_keys(name: str, context: Context, problem: Problem, step: Array) -> Array:
    return jax.vmap(jax.random.fold_in)(run_keys(name, context, problem), step)
