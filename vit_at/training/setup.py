"""From a configuration to what a run needs: mesh, data, model, initial state, compiled step.

Everything that can be refused is refused here, before the first file is written.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from vit_at import config as configuration
from vit_at import models, weights
from vit_at.attacks import Threat
from vit_at.data import pipeline, sources
from vit_at.data.sources import Examples
from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.evaluation.evaluator import select
from vit_at.evaluation.protocol import parse_attacks
from vit_at.models.build import build, training_dtype
from vit_at.training.masking import Masking
from vit_at.training.step import TrainState, init_state, train_step
from vit_at.workdir.checkpoint import load_trained
from vit_at.workdir.files import CONFIG_FILE

StepFn = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


class Setup(NamedTuple):
    """What does not change while a run runs."""

    config: ConfigDict
    mesh: Mesh
    train_set: Examples
    validation_set: Examples | None
    test_set: Examples
    model: Any
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.steps_per_epoch


def resolve(config: ConfigDict) -> ConfigDict:
    """The configuration with nothing left to derive from the machine; validated."""
    configuration.validate(config)
    config = ConfigDict(config).unlock()
    config.dtype = training_dtype(config)
    return config.lock()


def prepare(config: ConfigDict) -> Setup:
    """Opens data and model.

    Raises:
      UserError: whatever of the configuration does not fit the devices, the data or the model.
    """
    mesh = sharding.make_mesh()
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulate_steps)
    sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    threat, validation_attack = Threat.of(config.threat), config.eval.validation_attack
    parse_attacks(config.eval.attacks, threat)
    if [attack.name for attack in parse_attacks(validation_attack, threat)] != [validation_attack]:
        raise UserError(f"eval.validation_attack is '{validation_attack}'; it must be one attack")
    build(config, 1, config.dtype)  # to refuse its fields before any data is read
    data, threads = config.data, config.data.threads
    everything = sources.load(data, data.train_split, threads=threads)
    model = build(config, everything.num_classes, config.dtype)
    train_set, validation_set = sources.hold_out(everything, data.validation_examples, config.seed)
    steps_per_epoch = pipeline.steps_per_epoch(len(train_set), config.batch_size)
    test_set = sources.load(data, data.test_split, threads=threads)
    test_set = select(test_set, config.eval.num_examples)
    return Setup(config, mesh, train_set, validation_set, test_set, model, steps_per_epoch)


def initial_state(setup: Setup, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, on the devices: pre-trained or from the seed."""
    config, model = setup.config, setup.model
    key = jax.random.key(config.seed)
    if config.model.pretrained:
        params = weights.from_timm(_pretrained(config.model.pretrained), model)
    else:
        params = jax.jit(functools.partial(models.init_params, model))(key)
    state = init_state(params, optimizer, ema=config.ema_decay > 0)
    return sharding.distribute(state, setup.mesh, config.sharding)


def _pretrained(source: str) -> dict[str, np.ndarray]:
    """{timm name: array} of a work directory of ours, or of whatever ``weights.load`` reads."""
    workdir = epath.Path(source)
    if source.startswith(weights.HUB_PREFIX) or not (workdir / CONFIG_FILE).exists():
        return weights.load(source)
    which = "best" if (workdir / "checkpoints" / "best").exists() else "last"
    trained = load_trained(workdir, which)
    return weights.to_timm(trained.params, trained.model)


def compile_step(setup: Setup, optimizer: optax.GradientTransformation) -> StepFn:
    """The jitted training step (state, batch) -> (state, metrics); the state is donated."""
    config, model = setup.config, setup.model
    step = functools.partial(
        train_step,
        config=FrozenConfigDict(config),
        apply=models.classifier(model, config.data.mean, config.data.std),
        optimizer=optimizer,
        mesh=setup.mesh,
        masking=Masking.of(config.masking, model.patch_size),
        steps_per_epoch=setup.steps_per_epoch,
        num_blocks=model.num_blocks,
        num_classes=setup.train_set.num_classes,
    )
    return jax.jit(step, donate_argnums=0)


def float32_classifier(setup: Setup) -> models.Apply:
    """The model for evaluation, on pixels."""
    config = setup.config
    model = build(config, setup.train_set.num_classes, "float32")
    return models.classifier(model, config.data.mean, config.data.std)
