"""What a function computes, counted in its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flop(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of one call.

    arguments: arrays or shapes. Loops count as often as they run, 'while' loops once; of branches
    the longest counts.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Jaxpr) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Any) -> float:
    name, parameters = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, features = eqn.invars[1].aval, parameters["dimension_numbers"].rhs_spec[0]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[features]
    if name == "cond":
        return max(_of(branch.jaxpr) for branch in parameters["branches"])
    inner = [p for p in parameters.values() if isinstance(p, (Jaxpr, ClosedJaxpr))]
    times = parameters["length"] if name == "scan" else 1
    return times * sum(_of(getattr(p, "jaxpr", p)) for p in inner)
