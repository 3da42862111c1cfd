"""One training step: a pure function of the state and a batch.

Everything random is drawn up front from ``fold_in(key(seed), step)``; what follows is
deterministic. So a step can be checked number by number against the PyTorch reference, replayed
after a crash, and gives the same result on any number of devices.

    augment, mix -> draw -> [perturb -> gradient, on every device] -> mean over devices -> update

The part in brackets is mapped over the shards of the batch and communicates nothing.
"""

import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average, Collection
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from vit_at import models
from vit_at.attacks.losses import is_correct
from vit_at.attacks.threat import Threat
from vit_at.data import augment, mixing
from vit_at.distributed import sharding
from vit_at.distributed.sharding import SPLIT, WHOLE
from vit_at.training import awp
from vit_at.training.attack import Draws, Start, draw, perturb, reach, worst
from vit_at.training.masking import Masking, keep_probability
from vit_at.training.objectives import CLEAN, OBJECTIVES, folded, training_loss
from vit_at.training.optim import learning_rate

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds.

    step: updates done; ema, swa: parameters averaged exponentially, and equally, or None.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    swa: Any = None

    def weights(self, name: str) -> Any:
        """The parameters by name: raw, ema or swa."""
        return {"raw": self.params, "ema": self.ema, "swa": self.swa}[name]

    @property
    def trees(self) -> dict[str, Any]:
        """Everything but the step, by name: what a checkpoint stores under the step."""
        trees = {"params": self.params, "opt_state": self.opt_state}
        trees |= {"ema": self.ema, "swa": self.swa}
        return {name: tree for name, tree in trees.items() if tree is not None}


def init_state(
    params: Any, optimizer: optax.GradientTransformation, ema: bool, swa: bool = False
) -> TrainState:
    """The state before the first step."""
    averages = [jax.tree.map(jnp.copy, params) if on else None for on in (ema, swa)]
    # Jitted as one program: eagerly, each shape of a parameter would compile its own.
    opt_state = jax.jit(optimizer.init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, *averages)


class Step(NamedTuple):
    """What is static in a training step; num_blocks: attention blocks of the model (ARD)."""

    config: FrozenConfigDict
    apply: models.Apply
    optimizer: optax.GradientTransformation
    mesh: Mesh
    masking: Masking
    steps_per_epoch: int
    num_blocks: int
    num_classes: int

    @property
    def shares_clean(self) -> bool:
        """Whether attack and update share one pass over the clean images."""
        row = OBJECTIVES[self.config.objective]
        deterministic = getattr(self.apply, "deterministic", False)  # plain functions do not say
        return row.attack_needs_clean and CLEAN in row.images and deterministic


class Ball(NamedTuple):
    """An attack of a step, the same for all images: its threat, and the masks of its ``Draws``."""

    threat: Threat
    attn_keep: Array | None
    patch_keep: Array | None


class Part(NamedTuple):
    """Some images of a batch, with what belongs to each.

    images: [b, H, W, C] in [0, 1]; targets: [b, num_classes]; deltas: for each ball, the start of
    the perturbation, as images; keys: [b], of stochastic depth; adversarial: a tuple of arrays as
    images, see ``attacked``, or None: not attacked yet.
    """

    images: Array
    targets: Array
    deltas: tuple[Array, ...]
    keys: Array
    adversarial: tuple[Array, ...] | None = None


def ball_keys(key: Array, count: int) -> list[Array]:
    """A key for the draws of each ball, the given one for the first.

    ``attack.draw`` splits it into three, which in JAX are the key with 0, 1 and 2 folded in.
    """
    return [key, *(jax.random.fold_in(key, 2 + i) for i in range(1, count))]


def train_step(
    step: Step, state: TrainState, batch: dict[str, Array]
) -> tuple[TrainState, Collection]:
    """One update on one global batch, to be jitted with ``step`` bound and the state donated.

    Args:
      batch: image [B, H, W, C] uint8 and label [B] int32, split over the mesh.

    Returns:
      (new state, metrics): ``metrics.compute()`` is {name: scalar}, of the batch before the update.
    """
    config, masking = step.config, step.masking
    if config.model.fused_attention:
        step = step._replace(apply=models.for_device(step.apply, step.mesh.devices.flat[0]))
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    input_key, draw_key, train_key = jax.random.split(key, 3)
    progress = (state.step + 1) / step.steps_per_epoch
    images, targets = _inputs(step, input_key, batch)
    warm_up = config.threat.eps_warmup_epochs
    factor = jnp.minimum(1.0, progress / warm_up) if warm_up else jnp.ones(())
    threats = [threat.scaled(factor) for threat in Threat.all_of(config.threat)]
    draw_keys = ball_keys(draw_key, len(threats))
    draw_from = functools.partial(
        draw,
        objective=config.objective,
        masking=masking,
        progress=progress,
        image_shape=images.shape,
        num_blocks=step.num_blocks,
        start=Start(config.threat.start, config.data.std),
    )
    draws = [draw_from(key, threat=t) for key, t in zip(draw_keys, threats, strict=True)]
    keys = jax.random.split(train_key, len(images))  # one per image, for any split of the batch

    params = _laid_out(step, state.params, "replicated")  # gathered once, for all that follows
    part = Part(images, targets, tuple(drawn.delta for drawn in draws), keys)
    balls = tuple(
        Ball(reach(threat, config.threat.start), drawn.attn_keep, drawn.patch_keep)
        for threat, drawn in zip(threats, draws, strict=True)
    )
    if config.awp.gamma:
        part = part._replace(adversarial=_attacked(step, params, part, balls))
        gradient, _ = _mean_gradient(step, params, part, balls)
        gamma = jnp.where(progress > config.awp.warmup_epochs, config.awp.gamma, 0.0)
        params = awp.perturb_weights(step.apply, params, gradient, gamma)
    gradient, metrics = _mean_gradient(step, params, part, balls)
    metrics |= {
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": learning_rate(config, step.steps_per_epoch)(state.step),
        "eps": threats[0].eps,
    }
    if masking.ard or masking.prm:
        metrics["keep_probability"] = keep_probability(masking, progress)
    state = _update(step, state, gradient)
    one = jnp.ones((), jnp.int32)  # the metrics' merge is the mean over steps
    averages = {name: Average(metrics[name], one) for name in sorted(metrics)}
    return _laid_out(step, state, config.sharding), Collection.create_collection(**averages)


@jax.named_scope("inputs")
def _inputs(step, key, batch):
    """Augmented, mixed images [B, H, W, C] in [0, 1] and their targets [B, num_classes]."""
    config = step.config
    augment_key, mix_key = jax.random.split(key)
    data = config.data
    options = {"crop_padding": data.crop_padding, "flip": data.flip, "names": data.augment}
    images = augment.augment(augment_key, augment.to_float(batch["image"]), **options)
    (b, *_, channels), size = images.shape, data.image_size
    if images.shape[1] != size:  # in a phase of smaller images
        images = jax.image.resize(images, (b, size, size, channels), "linear")
    targets = augment.one_hot(batch["label"], step.num_classes, config.label_smoothing)
    if config.mixing.probability:
        images, targets = mixing.mix(mix_key, images, targets, **config.mixing)
    return images, targets


def _laid_out(step, tree, kind):
    """The tree, constrained to lie on the devices as ``sharding.layout`` says for ``kind``."""
    if step.config.sharding == "replicated":  # everything is whole anyway
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.layout(tree, step.mesh, kind))


def _mean_gradient(step, params, part, balls):
    """(gradient laid out as the state is, metrics): means over all images of the batch.

    Every device attacks and differentiates its own images, part by part; only the mean over them is
    communicated, once.
    """
    layout = sharding.layout(params, step.mesh, step.config.sharding)
    specs = jax.tree.map(lambda x: x.spec, layout)

    def on_device(params, part, balls):
        parts = sharding.in_parts(part, step.mesh, step.config.accumulate_steps)
        params = models.unstack_blocks(step.apply, params)
        of_part = functools.partial(loss_and_gradient, step, params, balls)
        gradient, metrics = _mean_over_parts(of_part, parts)
        means = models.stack_blocks(gradient), metrics
        return sharding.mean_over_devices(means, (specs, WHOLE))

    in_specs = (WHOLE, SPLIT, WHOLE)
    mapped = sharding.map_shards(on_device, step.mesh, in_specs, (specs, WHOLE))
    return mapped(params, part, balls)


def _attacked(step, params, part, balls):
    """``attacked`` for a batch: every device attacks its own images, in parts."""

    def on_device(params, part, balls):
        parts = sharding.in_parts(part, step.mesh, step.config.accumulate_steps)
        params = models.cast_kernels(step.apply, models.unstack_blocks(step.apply, params))
        found = jax.lax.map(lambda part: attacked(step, params, balls, part), parts)
        return jax.tree.map(lambda x: x.reshape(part.images.shape), found)

    return sharding.map_shards(on_device, step.mesh, (WHOLE, SPLIT, WHOLE))(params, part, balls)


def attacked(
    step: Step, params: Any, balls: tuple[Ball, ...], part: Part, clean: Array | None = None
) -> tuple[Array, ...]:
    """The adversarial images that the update passes over: a plain per-device function.

    Of one ball, or of the worst for each image; with ``threat.combine`` 'avg', of every ball.
    clean: logits of the images, if they have been computed before.
    """
    objective = step.config.objective
    if len(balls) > 1 and clean is None and OBJECTIVES[objective].attack_needs_clean:
        clean = jax.lax.stop_gradient(step.apply(params, part.images))
    options = {"objective": objective, "clean_logits": clean}
    found = []
    for ball, delta in zip(balls, part.deltas, strict=True):
        draws = Draws(delta, ball.attn_keep, ball.patch_keep)
        how = options | {"threat": ball.threat, "method": step.config.threat.method}
        found.append(perturb(step.apply, params, part.images, part.targets, draws, **how))
    if len(found) > 1 and step.config.threat.combine == "max":
        found = [worst(step.apply, params, found, part.targets, **options)]
    return tuple(found)


def loss_and_gradient(
    step: Step, params: Any, balls: tuple[Ball, ...], part: Part
) -> tuple[Any, dict[str, Array]]:
    """Attacks some images and differentiates the loss on them: a plain per-device function.

    Returns:
      (gradient by params, {name: scalar}): means over the images, and over the balls where each
      counts.
    """
    apply, objective = step.apply, step.config.objective

    def loss(params):
        clean = apply(params, part.images) if step.shares_clean else None
        adversarial = part.adversarial
        if adversarial is None:
            fixed = models.cast_kernels(apply, jax.lax.stop_gradient(params))
            adversarial = attacked(step, fixed, balls, part, clean)
        each = part.images, part.targets, clean
        copies = jax.tree.map(lambda x: jnp.concatenate([x] * len(adversarial)), each)
        images, targets, clean = copies
        others = [folded(part.keys, ball) for ball in range(1, len(adversarial))]
        rngs = {"drop_path": jnp.concatenate([part.keys, *others])}
        options = {"beta": step.config.beta, "rngs": rngs, "clean_logits": clean}
        attacked_images = jnp.concatenate(adversarial)
        value, aux = training_loss(
            objective, apply, params, images, attacked_images, targets, **options
        )
        return value, _batch_metrics(aux, targets)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return gradient, {"loss": value} | metrics


def _batch_metrics(aux, targets):
    """Accuracies and the objective's terms, scalars."""
    labels = jnp.argmax(targets, axis=-1)
    metrics = {name: term for name, term in aux.items() if not name.startswith("logits")}
    for kind, logits in (("adv", aux["logits_adv"]), ("clean", aux["logits_clean"])):
        if logits is not None:
            metrics[f"accuracy_{kind}"] = jnp.mean(is_correct(logits, labels))
    return metrics


def _mean_over_parts(function, parts):
    """Mean of function(part), a tree of arrays, over the leading axis of ``parts``."""
    first = jax.tree.map(lambda x: x[0], parts)
    count = len(jax.tree.leaves(parts)[0])
    if count == 1:
        return function(first)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total)


@jax.named_scope("update")
def _update(step, state, gradient):
    updates, opt_state = step.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema, swa, done = state.ema, state.swa, state.step + 1
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - step.config.ema_decay)
    if swa is not None:  # of n weights so far, from the last swa_epochs; before them, the weights
        first = round((step.config.epochs - step.config.swa_epochs) * step.steps_per_epoch)
        share = 1 / jnp.maximum(1.0, done - first)
        swa = optax.incremental_update(params, swa, share)
    return TrainState(done, params, opt_state, ema, swa)
