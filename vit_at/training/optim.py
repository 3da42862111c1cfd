"""Learning-rate schedules and the optimizer chain of the paper.

SGD:   clip the global gradient norm -> add weight decay -> momentum -> -learning rate
AdamW: clip the global gradient norm -> Adam -> add weight decay -> -learning rate
Muon:  clip the global gradient norm -> momentum, made orthogonal -> as AdamW
then, if asked for, a factor for each layer

The order matters: decay is added after clipping, to all parameters, and enters the momentum buffer
of SGD (coupled decay), as in torch.optim.SGD.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax import contrib

_RMS_OF_ADAM = 0.2  # of an update, as measured by Liu et al.
_OF_ADAM = {"conv_dw", "local_mp", "pos_proj"}  # modules with kernels that are no matrices
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "dist_token")


def learning_rate(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of the update that follows ``step`` earlier ones.

    The warm-up takes whole steps, the nearest number, and leaves at least one at the peak.
    """
    options = config.optimizer
    peak, total = options.learning_rate, config.epochs * steps_per_epoch
    warmup = min(round(options.warmup_epochs * steps_per_epoch), total - 1)
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


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int, depth: int = 0
) -> optax.GradientTransformation:
    """The chain above, by ``config.optimizer``; ``config.epochs`` ends the schedule.

    depth: number of blocks, for ``optimizer.layer_decay``.
    """
    options = config.optimizer
    decay = optax.add_decayed_weights(options.weight_decay)
    if options.name == "sgd":
        rule = [decay, optax.trace(options.momentum)]
    elif options.name == "muon":
        rule = [_muon(options)]
    else:
        rule = [optax.scale_by_adam(options.b1, options.b2), decay]
    clip = [clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    rate = optax.scale_by_learning_rate(learning_rate(config, steps_per_epoch))
    layers = [by_layer(options.layer_decay, depth)] if options.layer_decay != 1 else []
    return optax.chain(*clip, *rule, rate, *layers)


def _muon(options: ConfigDict) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for ``matrices``, Adam with Nesterov's momentum for the rest.

    The momentum of a matrix is made orthogonal by five Newton-Schulz iterations, and scaled to the
    root mean square of an update by Adam, so that one learning rate and one decay suit both (Liu
    et al. 2025, arXiv 2502.16982, Section 2.2).
    """
    return contrib.muon(
        -1.0,  # the sign and the rate follow in the chain
        beta=options.momentum,
        weight_decay=options.weight_decay,
        adam_b1=options.b1,
        adam_b2=options.b2,
        adam_weight_decay=options.weight_decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=_RMS_OF_ADAM,
    )


def matrices(params: Any) -> Any:
    """The axes that make a matrix of each kernel; None: Adam updates it, as all other parameters.

    A kernel [blocks, in, out] is a matrix for each block, a convolution [k, k, in, out], such as a
    patch embedding, one matrix of k * k * in rows. Adam updates the head, which is an embedding of
    classes, depthwise convolutions, which mix no inputs, and ConViT's projections of three
    coordinates.
    """

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or names[0].startswith("head") or _OF_ADAM & set(names):
            return None
        if leaf.ndim == 4:
            return contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return contrib.MuonDimensionNumbers(-2, -1)

    return jax.tree_util.tree_map_with_path(axes, params)


def by_layer(decay: float, depth: int) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay (Clark et al. 2020, arXiv 2003.10555, as in BEiT and MAE).

    The rate of layer l is decay ** (depth + 1 - l) times that of the last layer. Layer 0 holds the
    patch embedding, position embedding and class token; layer l the l-th block; the last layer,
    depth + 1, the final norm and the head. For ViT, DeiT and ConViT.
    """

    def layers(updates: Any) -> dict[str, np.ndarray]:
        """{top-level name: its layer, of a stack [blocks]}."""
        found = dict.fromkeys(updates, np.array(depth + 1))
        found |= dict.fromkeys(_EMBEDDINGS, np.array(0)) | {"last_block": np.array(depth)}
        first = 1
        for stack in ("local_blocks", "blocks"):  # in forward order
            if stack in updates:
                count = len(jax.tree.leaves(updates[stack])[0])
                found[stack] = np.arange(first, first + count)
                first += count
        return found

    def update(updates, state, params=None):
        del params
        of = layers(updates)

        def scaled(name, update):
            factor = np.reshape(decay ** (depth + 1 - of[name]), (-1, *[1] * (update.ndim - 1)))
            return update * jnp.asarray(factor, update.dtype)

        trees = updates.items()
        return {n: jax.tree.map(functools.partial(scaled, n), tree) for n, tree in trees}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    optax's own omits the 1e-6; then two updates no longer equal the reference's to nine digits.
    """

    def update(gradient, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradient) + 1e-6))
        return jax.tree.map(lambda g: g * factor, gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
