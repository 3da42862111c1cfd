"""The loop: from a configuration to a trained model with its measured robustness."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from clu.metrics import Collection
from etils import epath
from ml_collections import ConfigDict

from vit_at import models
from vit_at.attacks import Threat
from vit_at.config import evaluated_weights, evaluation_threat
from vit_at.console import Progress
from vit_at.data import pipeline
from vit_at.distributed import processes, sharding
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store
from vit_at.evaluation.protocol import parse_attacks
from vit_at.training import metrics, optim, phases
from vit_at.training.objectives import OBJECTIVES
from vit_at.training.setup import Setup, StepFn, compile_steps, initial_state
from vit_at.training.signals import Interrupted, Signals
from vit_at.training.step import TrainState
from vit_at.workdir.checkpoint import Checkpoints, check_store, has_checkpoint, tested
from vit_at.workdir.files import check_config, disk_errors, locked, write_atomically, write_config
from vit_at.workdir.results import Results


class Diverged(Exception):
    """Loss or gradient is not finite; the text says at which step and what to try."""


def train(
    config: ConfigDict, workdir: str | os.PathLike[str], *, wandb: str = ""
) -> list[dict[str, Any]]:
    """Trains a model as ``config`` says, then evaluates it on the test split.

    Uses all devices. Metrics, checkpoints and results go to ``workdir``; if a run with the same
    configuration has been interrupted there, it resumes, with bit-identical results.

    Args:
      config: a recipe, as ``get_config()`` of a file in ``configs/`` returns it.
      workdir: a directory, created if need be, or a ``gs://`` address.
      wandb: the Weights & Biases project that gets the metrics, too; '': none.

    Returns:
      The records of the final evaluation, one per attack: name, accuracy from 0 to 1, and protocol.
      They are also in ``workdir/results.json``.

    Raises:
      UserError: the configuration, data set or work directory can't be used; nothing was written.
        Or Weights & Biases can't start a run; then the work directory exists and can be resumed.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
      Diverged: loss or gradient became NaN or infinite; the last good state is kept.
    """
    opened = time.monotonic()
    workdir = epath.Path(workdir).expanduser()
    check_store(workdir)
    metrics.check_wandb(wandb)
    setup = Setup.of(config)
    optimizer = optim.make_optimizer(setup.config, setup.steps_per_epoch, setup.model.num_blocks)
    resumes = False  # it matters only where there are weights that need not be read
    if setup.config.model.pretrained:
        with disk_errors(workdir):
            resumes = processes.agree(has_checkpoint(workdir))
    state = initial_state(setup, optimizer, replaced=resumes)
    with disk_errors(workdir):
        check_config(workdir, setup.config)
        with locked(workdir, "training"):
            return _run(setup, optimizer, state, workdir, wandb, opened)


def _run(
    setup: Setup,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    workdir: epath.Path,
    wandb: str,
    opened: float,
) -> list[dict[str, Any]]:
    """``train`` in a locked work directory; opened: when it was called, by ``time.monotonic``."""
    checkpoints = Checkpoints(workdir, setup.config.checkpoint.keep)
    values: dict[str, Any] = {"best": None, "stopped": False}
    if restored := checkpoints.restore(state.trees, setup.mesh, setup.fingerprint):
        step, trees, values = restored
        state = state.replace(step=sharding.replicate(np.int32(step), setup.mesh), **trees)
    Results(workdir)  # fails now, not after the training, if its files are damaged
    write_config(workdir, setup.config)
    _describe(setup, state, workdir)
    if int(state.step) < setup.total_steps and not values.get("stopped"):
        loop = Loop(setup, compile_steps(setup, optimizer), checkpoints, workdir, values["best"])
        state = loop.run(state, wandb, opened)
    if jax.process_count() > 1:  # JAX's preemption service no longer needs SIGTERM
        processes.end_on_sigterm()
    params, weights = _tested_weights(setup, state, checkpoints, workdir)
    checkpoints.close()
    return _final_evaluation(setup, params, weights, workdir)


def _describe(setup: Setup, state: TrainState, workdir: epath.Path) -> None:
    """Logs what is about to run and what it will cost; writes the parameter overview."""
    config, done = setup.config, int(state.step)
    if jax.process_index() == 0:
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        write_atomically(workdir / "parameters.txt", overview + "\n")
    flops = phases.mean_step_flops(config, setup.model)
    parameters = parameter_overview.count_parameters(state.params)
    held_out = len(setup.validation_set or ())
    logging.info("work directory %s", workdir)
    label = OBJECTIVES[config.objective].label
    logging.info("%s of %s, matrix products in %s", label, config.model.name, config.dtype)
    logging.info("%s: %d images, %d held out", setup.train_set.name, len(setup.train_set), held_out)
    devices = setup.mesh.devices.flat
    logging.info("devices: %d of kind %s", len(devices), devices[0].device_kind)
    logging.info("%s", metrics.cost_estimate(flops, setup.total_steps, parameters))
    if done:
        logging.info("resuming at step %d of %d", done, setup.total_steps)


class Loop:
    """The steps of a run, with metrics, validation, checkpoints and signals between them."""

    def __init__(
        self,
        setup: Setup,
        steps: list[tuple[int, StepFn]],
        checkpoints: Checkpoints,
        workdir: epath.Path,
        best: dict[str, Any] | None,
    ):
        """steps: of ``compile_steps``; best: {'step', 'robust'} of the best validation, or None."""
        self._setup, self._config = setup, setup.config
        self._steps, self._checkpoints, self._workdir = steps, checkpoints, workdir
        self._best = best
        self._unlogged: list[Collection] = []  # the metrics of the steps since the last line
        self._validated = self._stopped = False
        self._collapse = metrics.Collapse(setup.train_set.num_classes)
        options, held_out = self._config.eval, setup.validation_set
        self._evaluator: Evaluator | None = None
        if held_out is not None and options.every_epochs:
            self._evaluator = _evaluator(setup, f"clean,{options.validation_attack}", held_out)

    def run(self, state: TrainState, wandb: str, opened: float) -> TrainState:
        """Takes all remaining steps; wandb: a project, or ''; opened: when the run was called."""
        first = int(state.step)
        self._progress = Progress(self._setup.total_steps, first, "steps")
        logging.info("compiling the step; the first one takes a while")
        self._saved = self._logged = time.monotonic()
        writer = metrics.Writer(self._workdir, first, wandb, self._config.to_dict())
        with contextlib.closing(writer) as self._writer, Signals() as signals:
            for step, batch in enumerate(self._batches(first), start=first + 1):
                step_fn = next(fn for begin, fn in reversed(self._steps) if begin < step)
                state, step_metrics = step_fn(state, batch)
                if step == first + 1:
                    jax.block_until_ready(step_metrics)
                    logging.info("first step after %.0f s", time.monotonic() - opened)
                self._unlogged.append(step_metrics)
                ending = signals.ending(step)
                self._after_step(state, step, ending)
                if ending or self._stopped:
                    break
        self._progress.close()
        self._checkpoints.wait()
        if signals.received is not None:
            logging.info("saved step %d; the same command goes on from there", step)
            raise Interrupted(signals.received)
        return state

    def _batches(self, first_step: int) -> Iterator[dict[str, jax.Array]]:
        """Batches on the devices, each sent while the step before it runs."""
        host_batches = pipeline.train_batches(
            self._setup.train_set,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            first_step=first_step,
            last_step=self._setup.total_steps,
            threads=self._config.data.threads,
            process=(jax.process_index(), jax.process_count()),
            extra=self._setup.extra,
        )
        for batch in host_batches:
            yield sharding.split_batch(batch, self._setup.mesh)

    def _after_step(self, state: TrainState, step: int, ending: bool) -> None:
        config, per_epoch = self._config, self._setup.steps_per_epoch
        epoch_ends = step % per_epoch == 0
        logs = step % config.log_every_steps == 0
        save = epoch_ends or ending or self._save_is_due(step, logs)
        text = self._log(step) if save or logs else ""
        if epoch_ends and self._evaluator:
            epoch, every = step // per_epoch, config.eval.every_epochs
            if epoch % every == 0 or epoch == config.epochs:
                self._validate(self._evaluator, state, step)
        if save:
            self._writer.settle()
            self._checkpoints.best.wait()  # the state names them: without them it lacks its best
            self._checkpoints.last.save(step, state.trees, self._values(step))
            self._saved = time.monotonic()
        self._progress.update(text)

    def _save_is_due(self, step: int, logs: bool) -> bool:
        """By the number of steps, or by the clock, which is checked when metrics are logged."""
        options = self._config.checkpoint
        if options.every_steps and step % options.every_steps == 0:
            return True
        if not (logs and options.every_minutes):
            return False
        minutes = (time.monotonic() - self._saved) / 60
        return processes.agree(minutes >= options.every_minutes)

    def _log(self, step: int) -> str:
        """Writes the means since the last line; returns the text beside the progress bar."""
        count, epoch = len(self._unlogged), step / self._setup.steps_per_epoch
        means = metrics.means(self._unlogged)
        self._unlogged.clear()
        if not (math.isfinite(means["loss"]) and math.isfinite(means["gradient_norm"])):
            self._progress.close()
            self._checkpoints.wait()
            found = f"the loss or its gradient is not finite at step {step}: training diverged"
            raise Diverged(f"{found}; {metrics.CAUSES}")
        seconds, self._logged = time.monotonic() - self._logged, time.monotonic()
        means["images_per_second"] = count * self._config.batch_size / seconds
        means |= metrics.device_memory(self._setup.mesh.local_devices)
        self._writer.write(step, {"epoch": epoch} | means)
        if alarm := self._collapse.check(means):
            self._progress.say(f"warning: {alarm}")
        return metrics.status_line(means, epoch, self._config.epochs)

    def _validate(self, evaluator: Evaluator, state: TrainState, step: int) -> None:
        """Robust validation; saves the weights if they are the best so far."""
        began = time.monotonic()
        if not self._validated:  # on a GPU that can take minutes
            self._progress.say("compiling the validation; the first one takes a while")
        params = sharding.replicate(self._evaluated(state), self._setup.mesh)
        accuracies = {n: float(c.mean()) for n, c in evaluator(params)}
        robust = accuracies[self._config.eval.validation_attack]
        epoch = step / self._setup.steps_per_epoch
        values = {f"validation/{name}": accuracy for name, accuracy in accuracies.items()}
        self._writer.write(step, {"epoch": epoch} | values)
        line = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items())
        self._progress.say(f"epoch {epoch:g}: validation {line}")
        best, classes = self._best, self._setup.train_set.num_classes
        if best is not None and (found := metrics.overfitted(robust, best["robust"], classes)):
            self._progress.say(f"warning: {found}")
            self._stopped = self._config.eval.stop_if_overfitted
            if self._stopped:
                self._progress.say(f"stopping; the best weights are of step {best['step']}")
        if best is None or robust > best["robust"]:
            self._best = {"step": step, "robust": robust}
            self._checkpoints.save_best(self._evaluated(state), self._values(step))
        self._logged = time.monotonic()
        if not self._validated:  # this one has compiled its programs
            self._progress.discount(self._logged - began)
            self._validated = True

    def _evaluated(self, state: TrainState) -> Any:
        return state.weights(evaluated_weights(self._config))

    def _values(self, step: int) -> dict[str, Any]:
        data = self._setup.train_set
        classes = {"num_classes": data.num_classes, "class_names": list(data.class_names)}
        run = {"run": self._setup.fingerprint}
        ended = self._stopped or step == self._setup.total_steps
        how = {"best": self._best, "stopped": self._stopped, "ended": ended}
        return {"step": step} | how | classes | run


def _evaluator(setup: Setup, attacks: str, examples: Any) -> Evaluator:
    config, threat = setup.config, Threat.of(evaluation_threat(setup.config))
    model = models.build(config, setup.train_set.num_classes, "float32")
    return Evaluator(
        models.classifier(model, config.data.mean, config.data.std),
        examples,
        parse_attacks(attacks, threat, precision=config.eval.precision),
        setup.mesh,
        batch_size=config.eval.batch_size,
        seed=config.seed,
        threads=config.data.threads,
    )


def _tested_weights(
    setup: Setup, state: TrainState, checkpoints: Checkpoints, workdir: epath.Path
) -> tuple[Any, dict[str, Any]]:
    """The weights for the final evaluation, and what its records say of them."""
    evaluated = state.weights(evaluated_weights(setup.config))
    checkpoints.wait()
    if tested(workdir, setup.config) == "best":
        restored = checkpoints.restore_best(evaluated, setup.mesh)
        if restored is not None:
            params = sharding.replicate(restored[0], setup.mesh)
            return params, {"checkpoint": "best", "step": restored[1]}
        logging.warning("no best checkpoint can be read; testing the last weights instead")
    params = sharding.replicate(evaluated, setup.mesh)
    return params, {"checkpoint": "last", "step": int(state.step)}


def _final_evaluation(
    setup: Setup, params: Any, weights: dict[str, Any], workdir: epath.Path
) -> list[dict[str, Any]]:
    config, examples = setup.config, setup.test_set
    tested = "{checkpoint} weights (step {step})".format(**weights)
    logging.info("testing the %s on %d images of %s", tested, len(examples), examples.name)
    evaluator = _evaluator(setup, config.eval.attacks, examples)
    about = {"seed": config.seed, "weights": weights}
    with locked(workdir, "evaluation", wait=True):
        return evaluate_and_store(evaluator, params, examples, Results(workdir), **about)
