"""How the matrix products of float32 arrays are computed in evaluations.

A GPU's tensor cores take no float32. They can compute it from several products of narrower parts
of each number. JAX's own choice on a GPU is one product in TF32, whose mantissa has 10 bits: too
coarse for an evaluation. docs/evaluate.md has the accuracy of each.
"""

import contextlib
from typing import Any

import jax
from jax.sharding import Mesh

from vit_at.distributed import sharding
from vit_at.errors import UserError

# Name: what JAX calls it. On a TPU, 'highest' is six products of bfloat16.
PRECISIONS = {
    "float32": "highest",
    "bf16x9": "BF16_BF16_F32_X9",
    "bf16x6": "BF16_BF16_F32_X6",
    "tf32x3": "TF32_TF32_F32_X3",
}


def products(name: str) -> contextlib.AbstractContextManager[Any]:
    """Within it, programs are traced with the products of one of PRECISIONS."""
    return jax.default_matmul_precision(PRECISIONS[name])


def check_precision(field: str, name: str, mesh: Mesh) -> None:
    """UserError: the name is unknown, or the devices can't compute so; field: named there."""
    if name not in PRECISIONS:
        raise UserError(f"{field} is '{name}'; use one of {', '.join(PRECISIONS)}")
    platform = sharding.platform(mesh)
    if name != "float32" and platform not in ("gpu", "cuda"):
        raise UserError(
            f"{field} is '{name}', which is for NVIDIA GPUs, but the devices are of kind "
            f"'{platform}'; use float32"
        )
