"""Attack losses: one value per example, [b]; the attacks maximise them.

logits [b, K]; targets [b, K] probabilities; labels [b] integers.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
CW_FLOOR = -10.0
DLR_FLOOR = 1e-12  # keeps the ratio finite where the top logits are equal


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-sum_k targets_k log softmax(logits)_k."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def kl_divergence(clean_logits: Array, logits: Array) -> Array:
    """KL(softmax(clean_logits) || softmax(logits)), the attack loss of TRADES."""
    log_clean = jax.nn.log_softmax(clean_logits)
    return jnp.sum(jnp.exp(log_clean) * (log_clean - jax.nn.log_softmax(logits)), axis=-1)


def is_correct(logits: Any, labels: Any, xp: ModuleType = jnp) -> Any:
    """Whether each example is classified correctly, [b] bool: every accuracy counts these.

    All logits must be finite, and the largest the label's. So a model that answers NaN is wrong, in
    clean accuracy and under attack. xp: numpy for host arrays.
    """
    return xp.isfinite(logits).all(-1) & (xp.argmax(logits, -1) == labels)


def at_least_float32(x: Any) -> Array:
    """x in float32, or in float64 if it is: the state of an attack is not narrower."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def finite_or_zero(x: Array) -> Array:
    """x with 0 for NaN and infinity: a gradient that does not exist moves nothing."""
    return jnp.where(jnp.isfinite(x), x, 0)


def best_wrong_class(logits: Array, labels: Array) -> Array:
    """The class other than the label with the largest logit, [b] integers."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.argmax(jnp.where(is_label, -jnp.inf, logits), axis=-1)


def pick(values: Array, classes: Array) -> Array:
    """values[i, classes[i]], [b]."""
    return jnp.take_along_axis(values, classes[:, None], axis=-1)[:, 0]


def margin(logits: Array, labels: Array) -> Array:
    """z_y - max_{k != y} z_k, [b]: the label's logit less the largest other one."""
    return pick(logits, labels) - pick(logits, best_wrong_class(logits, labels))


def cw_margin(logits: Array, labels: Array) -> Array:
    """The margin's negative, floored at -10 as in the paper's evaluation.

    Carlini and Wagner 2017, equation f_6. Because of the floor, an example that is correct by a
    margin over 10 has no gradient and stays where it starts; CW is then weaker than PGD.
    """
    return jnp.maximum(-margin(logits, labels), CW_FLOOR)


def dlr(logits: Array, labels: Array) -> Array:
    """Difference of logits ratio, -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)).

    Croce and Hein 2020, equation 6; z_(1) >= z_(2) >= ... are the sorted logits. It is scale
    invariant, so it has a gradient where the softmax is saturated. It needs at least 3 classes.
    """
    top = jax.lax.top_k(logits, 3)[0]
    return -margin(logits, labels) / (top[:, 0] - top[:, 2] + DLR_FLOOR)


def targeted_dlr(logits: Array, labels: Array, target_labels: Array) -> Array:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), equation 7; it needs at least 4 classes."""
    top = jax.lax.top_k(logits, 4)[0]
    difference = pick(logits, labels) - pick(logits, target_labels)
    return -difference / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + DLR_FLOOR)
