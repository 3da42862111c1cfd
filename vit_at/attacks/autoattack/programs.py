"""One attack, compiled for the devices of a mesh; ``packing`` calls it round by round."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_at.attacks.apgd import where
from vit_at.attacks.autoattack.checks import as_batch_function
from vit_at.attacks.autoattack.methods import Context, Method, Outcome, Problem
from vit_at.distributed import sharding
from vit_at.distributed.sharding import SPLIT, WHOLE

Array = jax.Array


class Cut(NamedTuple):
    """How the work is divided into rounds and batches.

    forward_steps, gradient_steps: steps of a round, for methods without and with gradients. Enough
      of them that the host's time between rounds is negligible.
    slots: the batch of a device is a multiple of this.
    most_slots: of a device; more activations would not fit into its cache. None: no limit.
    worth_compiling: floating-point operations that a narrower batch must save: those that the
      machine does while it compiles one.
    doubled: batches are the smallest one doubled, so that there are few.
    """

    forward_steps: int
    gradient_steps: int
    slots: int
    most_slots: int | None
    worth_compiling: float
    doubled: bool


# Assumed: two cores compile for 5 s and do 1.4e11 operations per second; an accelerator's host
# compiles for 20 s, and the accelerator does 2e13 in float32.
_ON_A_CPU = Cut(50, 8, slots=1, most_slots=8, worth_compiling=7e11, doubled=False)
_ON_AN_ACCELERATOR = Cut(200, 25, slots=8, most_slots=None, worth_compiling=4e14, doubled=True)


def cut_for(mesh: Mesh) -> Cut:
    """The division of work for the devices of a mesh."""
    return _ON_A_CPU if sharding.platform(mesh) == "cpu" else _ON_AN_ACCELERATOR


class Slots(NamedTuple):
    """The slots of a batch, each with at most one run: its problem, its state, whether it runs."""

    problem: Problem
    state: Any
    active: Array  # [b] bool


@dataclasses.dataclass(frozen=True)
class Program:
    """An attack on the devices of a mesh. Equal programs share their compiled code.

    randomised: the model takes a key for every image.
    A context given to ``admit`` and ``advance`` holds the model itself as ``logits_fn``: a
    ``jax.tree_util.Partial`` with its parameters, which jit takes as arguments.
    """

    method: Method
    mesh: Mesh
    randomised: bool

    def _batched(self, context: Context) -> Context:
        return context._replace(logits_fn=as_batch_function(context.logits_fn, self.randomised))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def admit(self, context: Context, slots: Slots, entering: Problem, taken: Array) -> Slots:
        """Starts the runs ``entering`` in the slots ``taken`` [b] bool."""

        def on_device(context, slots, entering, taken):
            state = self.method.start(self._batched(context), entering)
            problem = where(taken, entering, slots.problem)
            return Slots(problem, where(taken, state, slots.state), slots.active | taken)

        mapped = sharding.map_shards(on_device, self.mesh, (WHOLE, SPLIT, SPLIT, SPLIT))
        return mapped(context, slots, entering, taken)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def advance(self, context: Context, slots: Slots, limit: Array) -> tuple[Slots, Outcome, Array]:
        """A round: at most ``limit`` steps of the active slots, fewer once a quarter has ended.

        Returns:
          The slots, their outcomes, and the steps done by each device [devices].
        """
        method = self.method

        def on_device(context, slots, limit):
            context = self._batched(context)
            patience, began = slots.active.shape[0] // 4, slots.active.sum()

            def unfinished(carry):
                count, _, running = carry
                left = running.sum()
                return (count < limit) & (left > 0) & (began - left <= patience)

            def step(carry):
                count, state, running = carry
                moved = method.advance(context, slots.problem, state)
                state = where(running, moved, state)
                outcome = method.read(context, state)
                running &= ~outcome.success & (outcome.steps < method.steps)
                return count + 1, state, running

            begin = (jnp.zeros((), jnp.int32), slots.state, slots.active)
            count, state, running = jax.lax.while_loop(unfinished, step, begin)
            outcome = method.read(context, state)
            return Slots(slots.problem, state, running), outcome, jnp.full(1, count)

        mapped = sharding.map_shards(on_device, self.mesh, (WHOLE, SPLIT, WHOLE))
        return mapped(context, slots, limit)
