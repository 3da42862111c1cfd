"""Learning-rate schedules and the optimizer chain of the paper.

SGD:   clip the global gradient norm -> add weight decay -> momentum -> -learning rate
AdamW: clip the global gradient norm -> Adam -> add weight decay -> -learning rate

The order matters: decay is added after clipping, to all parameters, and enters the momentum buffer
(coupled decay), as in torch.optim.SGD.
"""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of the update that follows ``step`` earlier ones."""
    options = config.optimizer
    peak, total = options.learning_rate, config.epochs * steps_per_epoch
    warmup = round(options.warmup_epochs * steps_per_epoch)
    if options.schedule == "cyclic":
        shape = optax.linear_schedule(peak, 0.0, total - warmup)
    elif options.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, total - warmup)
    elif options.schedule == "step":
        shape = _step_schedule(config, steps_per_epoch, warmup)
    else:
        shape = optax.constant_schedule(peak)
    if not warmup:
        return shape
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), shape], [warmup])


def _step_schedule(config: ConfigDict, steps_per_epoch: int, offset: int) -> optax.Schedule:
    """The rate, multiplied by drop_factor at epoch E - x for each x in drop_before_end.

    E is ``config.epochs``. The first step always has the full rate, even if E <= x (as in the
    reference).
    """
    options = config.optimizer
    ends = [(config.epochs - before) * steps_per_epoch for before in options.drop_before_end]
    drops = [max(1, math.ceil(end)) - offset for end in ends]

    def schedule(step):
        passed = sum((step >= drop) * 1 for drop in drops)
        return options.learning_rate * jnp.power(options.drop_factor, passed)

    return schedule


def make_optimizer(config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """The chain above, by ``config.optimizer``; ``config.epochs`` ends the schedule."""
    options = config.optimizer
    decay = optax.add_decayed_weights(options.weight_decay)
    if options.name == "sgd":
        rule = [decay, optax.trace(options.momentum)]
    else:
        rule = [optax.scale_by_adam(options.b1, options.b2), decay]
    clip = [clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    rate = optax.scale_by_learning_rate(learning_rate(config, steps_per_epoch))
    return optax.chain(*clip, *rule, rate)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    optax's own omits the 1e-6; then two updates no longer equal the reference's to nine digits.
    """

    def update(gradient, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradient) + 1e-6))
        return jax.tree.map(lambda g: g * factor, gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
