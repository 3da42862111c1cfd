"""From a configuration to what a run needs: mesh, data, model, initial state, compiled step.

Every mistake in a configuration is refused here, before the first file is written.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from clu.metrics import Collection
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from vit_at import models, weights
from vit_at.attacks import Threat
from vit_at.config import MAX_STEPS, evaluation_threat
from vit_at.data import augment, own, pipeline, sources
from vit_at.data.examples import Examples
from vit_at.data.extra import PREFIX, Extra, open_npz
from vit_at.distributed import processes, sharding
from vit_at.distributed.precision import check_precision
from vit_at.errors import UserError
from vit_at.evaluation.protocol import Attack, check_classes, parse_attacks
from vit_at.training import objectives, phases
from vit_at.training.masking import Masking
from vit_at.training.step import Step, TrainState, init_state, train_step
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import Trained, load_trained, preferred
from vit_at.workdir.exported import load_exported
from vit_at.workdir.files import is_export, is_workdir, read_config

StepFn = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Collection]]


class Setup(NamedTuple):
    """What stays the same during a run."""

    config: ConfigDict
    mesh: Mesh
    train_set: Examples
    validation_set: Examples | None
    test_set: Examples
    model: Any
    steps_per_epoch: int
    extra: Extra | None = None

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The configuration and the training images as JSON values: what checkpoints belong to."""
        config = json.loads(json.dumps(self.config.to_dict()))
        data: dict[str, Any] = {"name": self.train_set.name, "images": len(self.train_set)}
        if contents := self.train_set.contents:
            data["contents"] = contents
        if self.extra is not None:
            data |= {"extra": self.extra.examples.name, "extra_images": len(self.extra.examples)}
        return {"config": config, "data": data}

    @classmethod
    def of(cls, config: ConfigDict, mesh: Mesh | None = None) -> "Setup":
        """Checks a configuration and opens its data and model.

        mesh: of the devices to train on; None: all there are.

        Raises:
          UserError: a field that is wrong, or does not fit the devices, the data or the model.
        """
        mesh = mesh or sharding.make_mesh()
        config = resolve(config, mesh)
        parts = config.accumulate_steps
        sharding.check_batch_size("batch_size", config.batch_size, mesh, parts)
        sharding.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
        check_precision("eval.precision", config.eval.precision, mesh)
        attacks = _evaluated_attacks(config)
        models.build(config, 1, config.dtype)  # to refuse its fields before any data is read
        data, threads = config.data, config.data.threads
        everything = sources.load(data, data.train_split, threads=threads)
        _check_classes(everything, attacks)
        model = models.build(config, everything.num_classes, config.dtype)
        phases.check(config, model)
        train_set, held_out = sources.hold_out(
            everything, data.validation_examples, config.seed, stratified=data.stratified
        )
        steps_per_epoch = pipeline.steps_per_epoch(len(train_set), config.batch_size)
        if config.epochs * steps_per_epoch > MAX_STEPS:
            raise UserError(
                f"epochs is {config.epochs}, or {config.epochs * steps_per_epoch} steps of "
                f"{config.batch_size} images; at most {MAX_STEPS} can be counted: lower epochs"
            )
        count = config.eval.num_examples
        test_set = sources.load(data, data.test_split, threads=threads, count=count)
        sources.check_splits(data, everything, test_set)
        extra = _extra(config, train_set, held_out, test_set)
        return cls(config, mesh, train_set, held_out, test_set, model, steps_per_epoch, extra)


def resolve(config: ConfigDict, mesh: Mesh) -> ConfigDict:
    """The configuration, checked, with what depends on the images and the devices filled in.

    Raises:
      UserError: a field that is wrong.
    """
    objectives.check(config)
    augment.check(config.data)
    config = own.from_images(ConfigDict(config).unlock())
    objectives.check(config)
    config.dtype = models.training_dtype(config, sharding.platform(mesh))
    return config.lock()


def _extra(
    config: ConfigDict, train_set: Examples, held_out: Examples | None, test_set: Examples
) -> Extra | None:
    """The set of ``data.extra``, of the classes and image size of the training set; None: none."""
    options = config.data.extra
    if not options.name:
        if options.fraction:
            raise UserError(
                f"data.extra.fraction is {options.fraction:g}, but data.extra.name is '', so there "
                "are no extra images; name their set, or set the fraction to 0"
            )
        return None
    count = round(options.fraction * config.batch_size)
    if not 0 < count < config.batch_size:
        raise UserError(
            f"data.extra.fraction is {options.fraction:g}, or {count} of the {config.batch_size} "
            "images of a batch; at least one must be extra and one not, such as by 0.7"
        )
    if options.name.startswith(PREFIX):
        path = pathlib.Path(options.name.removeprefix(PREFIX)).expanduser()
        return Extra(open_npz(path, train_set), count)
    data = sources.streamed(config.data)
    data.name = options.name
    found = sources.load(data, options.split)
    if found.class_names != train_set.class_names:
        raise UserError(
            f"data.extra.name is '{options.name}', whose classes differ from those of "
            f"'{config.data.name}'; choose a set with the same class names"
        )
    sources.check_extra(config.data, found, held_out, test_set)
    return Extra(found, count)


def _evaluated_attacks(config: ConfigDict) -> list[Attack]:
    """All attacks of validation and evaluation."""
    threat, validation_attack = Threat.of(evaluation_threat(config)), config.eval.validation_attack
    found = parse_attacks(validation_attack, threat)
    if [attack.name for attack in found] != [validation_attack]:
        raise UserError(f"eval.validation_attack is '{validation_attack}'; it must be one attack")
    return [*found, *parse_attacks(config.eval.attacks, threat)]


def _check_classes(examples: Examples, attacks: Sequence[Attack]) -> None:
    """Refuses what could only end with an error after the training."""
    if examples.num_classes < 2:
        raise UserError(
            f"{examples.name} has one class, {examples.class_names[0]}; training needs two or more"
        )
    check_classes(attacks, examples.num_classes)


def initial_state(
    setup: Setup, optimizer: optax.GradientTransformation, *, replaced: bool = False
) -> TrainState:
    """The state before the first step, on the devices: pre-trained or from the seed.

    replaced: a checkpoint takes its place, so pre-trained weights are not read: they may be gone.
    """
    config, model = setup.config, setup.model
    key = jax.random.key(config.seed)
    if config.model.pretrained and not replaced:
        source = os.path.expanduser(config.model.pretrained)
        if source.isidentifier():  # a packaged model's name, unless a directory has it
            source = str(registry.place(source))
        params = _pretrained(source, config.data, model)
    else:
        params = jax.jit(functools.partial(models.init_params, model))(key)
    state = init_state(params, optimizer, ema=config.ema_decay > 0, swa=config.swa_epochs > 0)
    return sharding.distribute(state, setup.mesh, config.sharding)


def _pretrained(source: str, data: ConfigDict, model: Any) -> Any:
    """Parameters of a work directory, an export, or a source that ``weights.read`` takes."""
    path = epath.Path(source)
    if processes.agree(not source.startswith(weights.HUB_PREFIX) and is_workdir(path)):
        which = preferred(path, read_config(path))
        return _adapted(load_trained(path, which), source, model)  # Orbax: all processes read
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))

    def read() -> Any:
        if not source.startswith(weights.HUB_PREFIX) and is_export(path):
            return _adapted(load_exported(path), source, model)
        return weights.from_timm(_of_file(source, data), model)

    return processes.from_first(read, shapes)


def _adapted(trained: Trained, source: str, model: Any) -> Any:
    """The parameters of a trained model for another one.

    UserError: their shapes differ, or what of the attention no shape shows.
    """
    params = weights.from_timm(weights.to_timm(trained.params, trained.model), model)
    if model.num_heads != trained.model.num_heads:
        raise UserError(
            f"model.num_heads is {model.num_heads}, but the weights of {source} are of "
            f"{trained.model.num_heads}; set --config.model.num_heads={trained.model.num_heads}"
        )
    own, theirs = (
        m.qk_scale or (m.embed_dim // m.num_heads) ** -0.5 for m in (model, trained.model)
    )
    if not math.isclose(own, theirs, rel_tol=1e-5):
        raise UserError(
            f"model.qk_scale is {model.qk_scale:g}, or {own:.4g}, but the weights of {source} need "
            f"{theirs:.4g}; set --config.model.qk_scale={trained.model.qk_scale}"
        )
    return params


def _of_file(source: str, data: ConfigDict) -> dict[str, np.ndarray]:
    """{timm name: array} of a file or the hub.

    Its own normalisation is not used, as a run normalises by ``data``; a message says so.
    """
    loaded = weights.read(source)
    if own := loaded.mean + loaded.std:
        logging.info(
            "this run normalises by %s, the weights' file by %s", data.mean + data.std, own
        )
    return loaded.arrays


def compile_steps(
    setup: Setup, optimizer: optax.GradientTransformation
) -> list[tuple[int, StepFn]]:
    """(steps done when it begins, the step) of each phase; compiled when first called."""
    return [
        (
            phase.epoch * setup.steps_per_epoch,
            compile_step(setup._replace(config=phase.config), optimizer),
        )
        for phase in phases.of(setup.config)
    ]


def compile_step(setup: Setup, optimizer: optax.GradientTransformation) -> StepFn:
    """The jitted training step (state, batch) -> (state, metrics); the state is donated."""
    config, model = setup.config, setup.model
    step = Step(
        FrozenConfigDict(config),
        models.classifier(model, config.data.mean, config.data.std),
        optimizer,
        setup.mesh,
        Masking.of(config.masking, model.patch_size),
        setup.steps_per_epoch,
        model.num_blocks,
        setup.train_set.num_classes,
    )
    return jax.jit(functools.partial(train_step, step), donate_argnums=0)
