"""Attack losses: one value per example, [b], all to be maximised over the perturbation.

logits [b, K]; targets [b, K] probabilities; labels [b] integers.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
CW_FLOOR = -10.0


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-sum_k targets_k log softmax(logits)_k."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def kl_divergence(clean_logits: Array, logits: Array) -> Array:
    """KL(softmax(clean_logits) || softmax(logits)), the attack loss of TRADES."""
    log_clean = jax.nn.log_softmax(clean_logits)
    return jnp.sum(jnp.exp(log_clean) * (log_clean - jax.nn.log_softmax(logits)), axis=-1)


def best_wrong_class(logits: Array, labels: Array) -> Array:
    """The class other than the label with the largest logit, [b] integers."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.argmax(jnp.where(is_label, -jnp.inf, logits), axis=-1)


def pick(values: Array, classes: Array) -> Array:
    """values[i, classes[i]], [b]."""
    return jnp.take_along_axis(values, classes[:, None], axis=-1)[:, 0]


def cw_margin(logits: Array, labels: Array) -> Array:
    """max_{k != y} z_k - z_y, floored at -10 as in the paper's evaluation.

    Carlini and Wagner 2017, equation f_6. The floor means that an example with a margin over 10
    has no gradient and stays where it starts: CW is then weaker than PGD, never the other way.
    """
    margin = pick(logits, best_wrong_class(logits, labels)) - pick(logits, labels)
    return jnp.maximum(margin, CW_FLOOR)
