"""What a run reports: metrics on disk, a status line, an estimate of its cost, a warning.

Writer      metrics.jsonl (one JSON object a line, with its step), TensorBoard event files, and
            Weights & Biases if asked for
means       of the metrics of some steps, which stay on the device until then
Collapse    notices a run that has stopped learning
"""

import collections
import functools
import importlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
from clu.metrics import Collection
from etils import epath
from ml_collections import ConfigDict

from vit_at.attacks import Threat
from vit_at.console import with_prefix
from vit_at.errors import UserError
from vit_at.schema import is_remote
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir.files import RemoteFile, write_atomically

METRICS_FILE = "metrics.jsonl"
_PROJECT = r"[\w.-][\w. -]{0,127}"
WANDB_FILE = "wandb_run_id.txt"  # so that a resumed run continues its curves


class Writer:
    """Appends metrics to ``metrics.jsonl``, TensorBoard and wandb; silent off process 0."""

    def __init__(
        self,
        workdir: epath.Path,
        resumed_step: int,
        wandb: str = "",
        config: dict[str, Any] | None = None,
    ):
        """Drops the lines after ``resumed_step``, which the resumed run will write again.

        wandb: a Weights & Biases project, which shows ``config`` beside the curves; '': none.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._wandb = _wandb_run(wandb, workdir, config or {}) if wandb else None
        path = workdir / METRICS_FILE
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resumed_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = RemoteFile(path) if is_remote(path) else path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line; ``step`` is the number of updates done."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        numbers = {name: v for name, v in values.items() if isinstance(v, (int, float))}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def settle(self) -> None:
        """Writes the lines that a bucket lacks: before a checkpoint of their steps is written, as
        a resumed run does not write them again.
        """
        if self._active and isinstance(self._file, RemoteFile):
            self._file.close()

    def close(self) -> None:
        """Flushes all."""
        if self._active:
            self._file.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


def check_wandb(project: str) -> None:
    """UserError if metrics can't go to this Weights & Biases project; '' is none."""
    if not project:
        return
    if not (isinstance(project, str) and re.fullmatch(_PROJECT, project)):
        raise UserError(
            f"--wandb={project!r} can't name a Weights & Biases project; "
            "use at most 128 letters, digits, spaces and _ . -, and no space first"
        )
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            f"--wandb={project} needs the package wandb; install it by pip install "
            "'vit_at[wandb]', or leave the option out"
        ) from None


def _wandb_run(project: str, workdir: epath.Path, config: dict[str, Any]) -> Any:
    """Starts a run of Weights & Biases, or continues the one of this work directory."""
    wandb: Any = importlib.import_module("wandb")
    place = workdir / WANDB_FILE
    known = place.read_text().strip() if place.exists() else None
    try:
        run = wandb.init(
            project=project,
            name=workdir.name,
            id=known,
            resume="allow",
            dir=None if is_remote(workdir) else str(workdir),
            config=config,
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"Weights & Biases can't start a run of --wandb={project} ({reason}); run 'wandb "
            "login', or set WANDB_MODE=offline to keep the run in the work directory"
        ) from None
    write_atomically(place, f"{run.id}\n")
    return run


def _step(line: str) -> float:
    """The step of a line; infinity for one that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def means(steps: Sequence[Collection]) -> dict[str, float]:
    """The mean of each metric over some steps; fetches all of them from the device at once."""
    merged = functools.reduce(lambda total, step: total.merge(step), jax.device_get(steps))
    return {name: float(value) for name, value in merged.compute().items()}


def device_memory(devices: Iterable[jax.Device]) -> dict[str, float]:
    """{"device_memory_gib": peak use of the fullest device}; empty where devices don't say."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [known["peak_bytes_in_use"] for known in stats if "peak_bytes_in_use" in known]
    return {"device_memory_gib": max(peaks) / 2**30} if peaks else {}


def step_flops(config: ConfigDict, forward: float) -> float:
    """Floating-point operations of one update.

    forward: of one image's forward pass. A gradient costs one more forward pass for the inputs and
    one more for the weights: an attack step is 2 passes, the last point of APGD one, an update 3
    for each image it passes over, and twice as many with adversarial weight perturbation. Of
    several balls each is attacked; to find the worst is a pass for each.
    """
    row, balls = OBJECTIVES[config.objective], len(Threat.all_of(config.threat))
    update = 3 * (2 if config.awp.gamma else 1) * len(row.images)
    if row.attack is None:
        return update * forward * config.batch_size
    attack = balls * (2 * config.threat.steps + (config.threat.method == "apgd"))
    if balls > 1 and config.threat.combine == "max":
        attack += balls
    elif balls > 1:
        update *= balls
    return (attack + row.attack_needs_clean + update) * forward * config.batch_size


def cost_estimate(flops: float, steps: int, parameters: int) -> str:
    """One line on what a run will take, printed before its first step."""
    return (
        f"{parameters:,} parameters; {with_prefix(flops)}FLOP a step, {steps:,} steps, "
        f"{with_prefix(flops * steps)}FLOP in all"
    )


CAUSES = (
    "likely causes: a learning rate too high for this model (try optimizer.learning_rate / 10, or "
    "optimizer.warmup_epochs=1), an attack too strong to start with (try threat.eps_warmup_epochs, "
    "or pre-trained weights), or data.mean and data.std that do not belong to the data"
)


class Collapse:
    """Notices a run that has stopped learning; see ``check``."""

    def __init__(self, num_classes: int, windows: int = 20):
        self._chance, self._count, self._said = 1 / num_classes, windows, False
        self._windows: collections.deque[tuple[float, float]] = collections.deque(maxlen=windows)

    def check(self, means: dict[str, Any]) -> str | None:
        """A warning if the last windows show a collapse, given once; None otherwise.

        A run has collapsed if its accuracy is at chance and its loss is constant: the mean over the
        newer half of the windows is within 1 % of that over the older half.
        """
        accuracy = max(means[n] for n in means if n.startswith("accuracy"))
        self._windows.append((means["loss"], accuracy))
        if self._said or len(self._windows) < self._count:
            return None
        losses, accuracies = np.array(self._windows).T
        older, newer = losses[: self._count // 2].mean(), losses[self._count // 2 :].mean()
        accuracy = float(accuracies.mean())
        if accuracy > 1.25 * self._chance or abs(newer - older) > 0.01 * abs(older):
            return None
        self._said = True
        return (
            f"this run looks collapsed: training accuracy {accuracy:.1%} is at chance "
            f"({self._chance:.1%}) and the loss stands at {newer:.3f}; {CAUSES}"
        )


def overfitted(robust: float, best: float, num_classes: int) -> str | None:
    """A sentence if validation shows catastrophic overfitting; None otherwise.

    A cheap attack can suddenly train a model that withstands only this attack (Wong, Rice and
    Kolter 2020, arXiv 2001.03994): accuracy under PGD falls to less than half of its best, which
    was over chance.
    """
    if best <= 1.25 / num_classes or robust >= best / 2:
        return None
    return (
        f"robust validation accuracy fell from {best:.1%} to {robust:.1%}: catastrophic "
        "overfitting to the training attack; use more threat.steps, threat.start=noise, or a "
        "longer threat.eps_warmup_epochs"
    )


def status_line(means: dict[str, float], epoch: float, epochs: int) -> str:
    """The text beside the progress bar."""
    kind = "adv" if "accuracy_adv" in means else "clean"
    keep = f"keep {means['keep_probability']:.2f} " if "keep_probability" in means else ""
    memory = f" {means['device_memory_gib']:.1f} GiB" if "device_memory_gib" in means else ""
    return (
        f"epoch {epoch:.1f}/{epochs} loss {means['loss']:.3f} "
        f"{kind} {means[f'accuracy_{kind}']:.1%} "
        f"lr {means['learning_rate']:.2g} {keep}grad {means['gradient_norm']:.2f} "
        f"{means['images_per_second']:.0f} img/s{memory}"
    )
