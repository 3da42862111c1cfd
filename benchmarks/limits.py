"""The machine's limit: its best matrix-product rate, and what a step needs at least at that rate.

Only matrix products are counted. With L and A the operations of the linear layers and of the two
attention products in one forward pass,

    forward          L + A
    input gradient   L + 2 A      (each attention product has two operands, both differentiated)
    weight gradient  L

so an attack step costs 2 L + 3 A, and a training pass 3 L + 3 A (less than half a per cent is
counted too much there: no gradient goes into the images). The clean logits that TRADES' attack
needs are those of its training pass.
"""

import functools
import time

import jax
from common import CLASSES, Case
from jax.sharding import PartitionSpec

from vit_at.distributed import sharding
from vit_at.models import build, ops
from vit_at.training.objectives import OBJECTIVES

SQUARES = {"cpu": (1024, 2048), "gpu": (4096, 8192), "tpu": (4096, 8192)}


def case_flops(case: Case, config) -> float:
    """Floating-point operations of one run of a case, with what is needed only."""
    model = build(config, CLASSES, case.dtype)
    attention = 2 * model.multiply_adds()[1]
    linear = model.forward_flops() - attention
    forward = linear + attention
    attack_step, training_pass = 2 * linear + 3 * attention, 3 * (linear + attention)
    if case.objective == "pgd":
        return case.batch * (case.steps * attack_step + forward)
    objective = OBJECTIVES[case.objective]
    attack_steps = case.steps if objective.attack else 0
    return case.batch * (len(objective.images) * training_pass + attack_steps * attack_step)


def model_shapes(case: Case, config) -> list[tuple[int, int, int]]:
    """(m, k, n) of the products that dominate the model, for one batch."""
    model = build(config, CLASSES, case.dtype)
    rows, d = case.batch * (model.num_tokens + 1), model.embed_dim
    hidden = int(d * model.mlp_ratio)
    return [(rows, d, 3 * d), (rows, d, hidden), (rows, hidden, d)]


def matmul_rates(dtype: str, shapes: list[tuple[int, int, int]]) -> dict[str, float]:
    """{'m x k x n': operations per second}, the best of several, with m split over all devices."""
    mesh = sharding.make_mesh()
    squares = SQUARES.get(sharding.platform(mesh), SQUARES["cpu"])
    rates = {}
    for m, k, n in [*((side, side, side) for side in squares), *shapes]:
        m = m // mesh.size * mesh.size
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / _seconds(mesh, m, k, n, dtype)
    return rates


def _seconds(mesh, m, k, n, dtype, chain=8):
    """Of one product; on accelerators many run back to back, so that no launch is counted."""
    keys = jax.random.split(jax.random.key(0))  # a processor is slower where many bits change
    left = jax.random.normal(keys[0], (m, k)).astype(dtype)
    left = jax.device_put(left, jax.NamedSharding(mesh, sharding.SPLIT))
    right = sharding.replicate(jax.random.normal(keys[1], (k, n)).astype(dtype), mesh)

    @functools.partial(jax.jit, static_argnums=())
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(sharding.SPLIT, PartitionSpec()),
        out_specs=sharding.SPLIT,
    )
    def product(a, b):
        return ops.linear(a, b)

    product(left, right).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        outputs = [product(left, right) for _ in range(chain)]
        jax.block_until_ready(outputs)
        best = min(best, (time.perf_counter() - start) / chain)
    return best
