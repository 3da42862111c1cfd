"""The arguments of ``vit_at.evaluate`` from Python: NumPy's numbers, and norms in any case."""

import fractions
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from vit_at.configs import default
from vit_at.evaluate import evaluate, norms
from vit_at.evaluation import arguments, curves


@arguments.checked
def asked(
    eps: float | None = None,
    seed: int = 0,
    restarts: int = 1,
    num_heads: int = 0,
    image_size: int = 0,
    checkpoint: str = "",
):
    """Has the arguments of ``evaluate`` whose ranges are checked."""
    return eps, seed


@pytest.mark.parametrize(
    "half",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        jnp.float32(0.5),
        fractions.Fraction("1/2"),
    ],
)
def test_every_kind_of_number_is_a_float(half):
    eps, seed = asked(half, seed=np.int64(3))
    assert (eps, type(eps), seed, type(seed)) == (0.5, float, 3, int)


def test_evaluate_takes_an_array_of_eps_and_a_norm_in_capitals(tmp_path):
    assert next(iter(inspect.signature(evaluate).parameters)) == "source"
    options = {"num_examples": np.int64(8), "batch_size": 8, "workdir": str(tmp_path)}
    for eps in (np.array([0.25, 0.5]), (np.float32(0.25), jnp.float32(0.5))):
        records = evaluate("digits_deit_64x2", "pgd-1", norm="L2", eps=eps, **options)
        threats = [(r["protocol"]["norm"], r["protocol"]["eps"]) for r in records]
        assert threats == [("l2", 0.25), ("l2", 0.5)]


def test_norms_may_be_in_any_case():
    found = curves.threats(default.get_config(), norms("Linf,L2"), (8 / 255, 0.5), None)
    assert [threat.norm for threat in found] == ["linf", "l2"]
