"""A user's model as a function that jit takes apart: arrays are traced, all else is static."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vit_at.errors import UserError

Array = jax.Array


def as_function(model: Any) -> jax.tree_util.Partial:
    """A pytree of the model's arrays that is called as the model is.

    model: a function; ``functools.partial`` of one, such as ``partial(module.apply, variables,
      train=False)``; a Flax linen pair (module, variables); or a Flax nnx module.

    Raises:
      UserError: it is none of these.
    """
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        model = functools.partial(model[0].apply, model[1])
    elif "flax.nnx" in sys.modules and isinstance(model, sys.modules["flax.nnx"].Module):
        model = functools.partial(_call_nnx, *sys.modules["flax.nnx"].split(model))
    if not callable(model):
        raise UserError(
            f"logits_fn is a {type(model).__name__}; it must be a function of images, a pair "
            "(linen module, variables) or an nnx module"
        )
    if not isinstance(model, functools.partial):
        return jax.tree_util.Partial(model)
    leaves, treedef = jax.tree.flatten((model.args, model.keywords))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))}
    static = tuple((i, x) for i, x in enumerate(leaves) if i not in arrays)
    return jax.tree_util.Partial(_Bound(model.func, treedef, static), arrays)


def _call_nnx(graph: Any, state: Any, images: Array) -> Array:
    return sys.modules["flax.nnx"].merge(graph, state)(images)


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with bound arguments, less the arrays among their leaves.

    Calls with an equal function and equal static arguments share a compiled program.
    """

    function: Callable[..., Array]
    treedef: Any
    static: tuple[tuple[int, Any], ...]

    def __call__(self, arrays: dict[int, Array], *inputs: Array) -> Array:
        args, keywords = self._arguments(arrays)
        return self.function(*args, *inputs, **keywords)

    def _arguments(self, arrays: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = arrays | dict(self.static)
        return jax.tree.unflatten(self.treedef, [leaves[i] for i in range(len(leaves))])

    def __hash__(self) -> int:
        return hash((self.function, self.treedef))  # a static argument may have no hash

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function with these arguments bound, behind the arrays."""
        missing = set(range(self.treedef.num_leaves)) - dict(self.static).keys()
        args, keywords = self._arguments(dict.fromkeys(missing))
        bound = inspect.signature(functools.partial(self.function, *args, **keywords))
        arrays = inspect.Parameter("arrays", inspect.Parameter.POSITIONAL_ONLY)
        free = [
            p.replace(kind=p.POSITIONAL_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p
            for p in bound.parameters.values()
        ]
        return bound.replace(parameters=[arrays, *free])
