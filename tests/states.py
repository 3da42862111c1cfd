"""A training state to save and restore."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.distributed import sharding
from vit_at.training.step import TrainState

MESH = sharding.make_mesh(jax.devices()[:2])


def state_of(step: int, ema: bool = False) -> TrainState:
    """A state whose arrays follow from its step."""
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(30, 40)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=40), jnp.float32),
    }
    momentum = jax.tree.map(lambda x: 0.1 * x, params)
    opt_state = ((), {"trace": momentum}, jnp.int32(step))
    average = jax.tree.map(lambda x: 0.5 * x, params) if ema else None
    return sharding.replicate(TrainState(jnp.int32(step), params, opt_state, average), MESH)
