"""One training step: a pure function of the state and a batch.

Everything random is drawn up front from ``fold_in(key(seed), step)``; what follows is
deterministic. So a step can be checked number by number against the PyTorch reference, replayed
after a crash, and gives the same result on any number of devices.

    augment, mix -> draw -> [perturb -> gradient, on every device] -> mean over devices -> update

What is in brackets is mapped over the shards of the batch and sends nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from vit_at import models
from vit_at.attacks import pgd
from vit_at.attacks.threat import Threat, random_start
from vit_at.data import augment, mixing
from vit_at.distributed import sharding
from vit_at.training import masking as masks
from vit_at.training import objectives
from vit_at.training.optim import learning_rate

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds. step: updates done; ema: averaged parameters, or None."""

    step: Array
    params: Any
    opt_state: Any
    ema: Any

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate: the averaged ones where there are any."""
        return self.params if self.ema is None else self.ema

    @property
    def trees(self) -> dict[str, Any]:
        """What is not the step, by name: what a checkpoint stores under the step."""
        trees = {"params": self.params, "opt_state": self.opt_state, "ema": self.ema}
        return {name: tree for name, tree in trees.items() if tree is not None}


class Draws(NamedTuple):
    """Everything random in the attack of one step.

    delta: [B, H, W, C] in pixel units, before it is brought into the image range.
    attn_keep: [steps, num_blocks] bool (ARD); None: off.
    patch_keep: [steps, H/p, W/p] bool (PRM); None: off.
    """

    delta: Array
    attn_keep: Array | None
    patch_keep: Array | None


def init_state(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    # One program: run piece by piece, each shape of a parameter would compile its own.
    opt_state = jax.jit(optimizer.init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average)


def draw(
    key: Array,
    *,
    objective: str,
    threat: Threat,
    masking: masks.Masking,
    progress: float | Array,
    image_shape: tuple[int, int, int, int],
    num_blocks: int,
    start: str = "random",
    std: float | tuple[float, ...] = 1.0,
) -> Draws:
    """Draws what the attack of one step needs.

    Args:
      progress: epochs done once this step is, (step + 1) / steps_per_epoch: the warm-up's time.
      image_shape: [B, H, W, C].
      start: 'random': AT starts uniformly in the ball, TRADES and MART at 0.001 N(0, 1) in
        normalised units; 'zero': all start at the image.
      std: the normalisation's, per channel: what a normalised unit is in pixel units.
    """
    start_key, attn_key, patch_key = jax.random.split(key, 3)
    if start == "zero":
        delta = jnp.zeros(image_shape)
    elif objective in objectives.GAUSSIAN_START:
        scale = objectives.START_SCALE * jnp.asarray(std)
        delta = scale * jax.random.normal(start_key, image_shape)
    else:
        delta = random_start(start_key, image_shape, threat)
    probability = masks.keep_probability(masking, progress)
    attn_keep = patch_keep = None
    if masking.ard:
        attn_keep = masks.draw_attn_keep(attn_key, threat.steps, num_blocks, probability)
    if masking.prm:
        grid = (image_shape[1] // masking.patch_size, image_shape[2] // masking.patch_size)
        patch_keep = masks.draw_patch_keep(patch_key, threat.steps, grid, probability)
    return Draws(delta, attn_keep, patch_keep)


def perturb(
    apply: Callable[..., Array],
    params: Any,
    images: Array,
    targets: Array,
    draws: Draws,
    *,
    objective: str,
    threat: Threat,
    clean_logits: Array | None = None,
) -> Array:
    """The adversarial images that ``objective`` trains on, in [0, 1].

    A plain per-device function: images, targets and draws.delta are any shard of a batch.
    clean_logits: of the images; None: computed here where TRADES needs them.
    """
    if objective == "natural":
        return images
    loss = objectives.attack_loss(objective, apply, params, images, targets, clean_logits)
    return pgd.training_attack(loss, images, draws.delta, draws.attn_keep, draws.patch_keep, threat)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    config: FrozenConfigDict,
    apply: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    masking: masks.Masking,
    steps_per_epoch: int,
    num_blocks: int,
    num_classes: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One update on one global batch, to be jitted with the state donated.

    Args:
      batch: image [B, H, W, C] uint8 and label [B] int32, split over the mesh.

    Returns:
      (new state, {name: scalar}): the metrics are those of the batch before the update.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    input_key, draw_key, train_key = jax.random.split(key, 3)
    progress = (state.step + 1) / steps_per_epoch
    images, targets = _inputs(input_key, batch, config, num_classes)
    threat = Threat.of(config.threat).scaled(_eps_factor(config, progress))
    draws = draw(
        draw_key,
        objective=config.objective,
        threat=threat,
        masking=masking,
        progress=progress,
        image_shape=images.shape,
        num_blocks=num_blocks,
        start=config.threat.start,
        std=config.data.std,
    )

    def constrain(tree, kind):
        if config.sharding == "replicated":  # nothing to say
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding.layout(tree, mesh, kind))

    params = constrain(state.params, "replicated")  # gathered, once for all that follows
    keys = jax.random.split(train_key, len(images))  # one an image: no split of the batch shows
    gradient, metrics = _gradient(mesh, apply, params, images, targets, draws, keys, threat, config)
    metrics |= {
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": learning_rate(config, steps_per_epoch)(state.step),
        "eps": threat.eps,
    }
    if masking.ard or masking.prm:
        metrics["keep_probability"] = masks.keep_probability(masking, progress)
    state = _update(state, gradient, optimizer, config.ema_decay)
    return constrain(state, config.sharding), metrics


def _inputs(key, batch, config, num_classes):
    """Augmented, mixed images [B, H, W, C] in [0, 1] and their targets [B, num_classes]."""
    augment_key, mix_key = jax.random.split(key)
    images = augment.augment(
        augment_key,
        augment.to_float(batch["image"]),
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
    )
    targets = augment.one_hot(batch["label"], num_classes, config.label_smoothing)
    if config.mixing.probability:
        images, targets = mixing.mix(mix_key, images, targets, **config.mixing)
    return images, targets


def _eps_factor(config, progress):
    """Factor on eps and step size while eps warms up; scalar in (0, 1]."""
    if not config.threat.eps_warmup_epochs:
        return jnp.ones(())
    return jnp.minimum(1.0, progress / config.threat.eps_warmup_epochs)


def _gradient(mesh, apply, params, images, targets, draws, keys, threat, config):
    """(gradient laid out as the state is, metrics): the means over all images of the batch.

    Every device attacks and differentiates its own images, a part of them after the other; only
    their mean is sent, once.
    """
    specs = jax.tree.map(lambda x: x.spec, sharding.layout(params, mesh, config.sharding))
    objective = config.objective
    # A model that does the same in training and attack passes over TRADES' clean images once.
    shares_clean = objective == "trades" and models.is_deterministic(apply)

    def of_part(params, draws, threat, part):
        images, targets, delta, keys = part
        draws = draws._replace(delta=delta)

        def loss(params):
            clean = apply(params, images) if shares_clean else None
            adversarial = perturb(
                apply,
                jax.lax.stop_gradient(params),
                images,
                targets,
                draws,
                objective=objective,
                threat=threat,
                clean_logits=clean,
            )
            return objectives.training_loss(
                objective,
                apply,
                params,
                images,
                adversarial,
                targets,
                beta=config.beta,
                rngs={"drop_path": keys},
                clean_logits=clean,
            )

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, {"loss": value} | _batch_metrics(aux, targets)

    def of_shard(params, images, targets, draws, keys, threat):
        parts = sharding.in_parts((images, targets, draws.delta, keys), config.accumulate_steps)
        params = models.by_block(apply, params)
        of_mine = functools.partial(of_part, params, draws, threat)
        gradient, metrics = _mean_over_parts(of_mine, parts)
        means = models.stacked(apply, gradient), metrics
        return sharding.mean_over_devices(means, (specs, sharding.WHOLE))

    split, whole = sharding.SPLIT, sharding.WHOLE
    in_specs = (whole, split, split, Draws(split, whole, whole), split, whole)
    mapped = sharding.map_shards(of_shard, mesh, in_specs, (specs, whole))
    return mapped(params, images, targets, draws, keys, threat)


def _batch_metrics(aux, targets):
    """Accuracies and the objective's terms, scalars."""
    labels = jnp.argmax(targets, axis=-1)
    metrics = {name: term for name, term in aux.items() if not name.startswith("logits")}
    for kind, logits in (("adv", aux["logits_adv"]), ("clean", aux["logits_clean"])):
        if logits is not None:
            metrics[f"accuracy_{kind}"] = jnp.mean(jnp.argmax(logits, -1) == labels)
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


def _update(state, gradient, optimizer, ema_decay):
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema)
