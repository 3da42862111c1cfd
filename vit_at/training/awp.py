"""Adversarial weight perturbation (AWP; Wu, Xia and Wang 2020, arXiv 2004.05884).

The update descends the loss at the worst weights near the present ones, w + v:

    v = gamma * ||w|| * g / ||g||       g = gradient of the loss on the adversarial images at w
    w <- update(w, gradient of the same loss at w + v)

Norms are of one weight array of one layer (equations 8 and 10 of the paper, one step). Arrays other
than weights, such as biases, norms' scales and embeddings, are not perturbed, as in the authors'
code. It costs one more gradient: three forward passes per image. Weight decay acts on w; in the
authors' code on w + v.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_at.models import Apply

Array = jax.Array


def perturb_weights(apply: Apply, params: Any, gradient: Any, gamma: float | Array) -> Any:
    """w + v for all parameters; ``gradient``, a tree like ``params``, is of the loss at w."""
    model = getattr(apply, "model", None)  # plain functions have no stacks of blocks
    stacks = {name.split("/")[0] for name in getattr(model, "stacks", ())}

    def of_array(path, weight, slope):
        if path[-1] != "kernel":
            return weight
        axes = tuple(range(1 if path[0] in stacks else 0, weight.ndim))
        norms = [jnp.sqrt((x**2).sum(axes, keepdims=True)) for x in (weight, slope)]
        return weight + gamma * norms[0] * slope / (norms[1] + 1e-20)

    slopes = flatten_dict(gradient)
    return unflatten_dict({p: of_array(p, w, slopes[p]) for p, w in flatten_dict(params).items()})
