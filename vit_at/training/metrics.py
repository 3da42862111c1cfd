"""What a run says of itself: metrics on disk, a progress bar, an estimate of cost, an alarm.

Writer      metrics.jsonl (one JSON object a line, with its step) and TensorBoard event files
Window      per-step metrics that stay on the device until they are averaged
Collapse    notices a run that has stopped learning
"""

import collections
import json
import math
from typing import Any

import jax
import numpy as np
import tensorboardX
from etils import epath

from vit_at.console import with_prefix
from vit_at.workdir.files import RemoteFile, is_remote, write_atomically

METRICS_FILE = "metrics.jsonl"


class Writer:
    """Appends metrics to ``metrics.jsonl`` and to TensorBoard events; silent off process 0."""

    def __init__(self, workdir: epath.Path, resumed_step: int):
        """Drops the lines after ``resumed_step``, which a killed run wrote and will write again."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
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
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._active:
            self._file.close()
            self._board.close()


def _step(line: str) -> float:
    """The step of a line; infinity for one that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


class Window:
    """Metrics of some steps, fetched from the device only when their means are asked for."""

    def __init__(self):
        self._steps: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of one step, without waiting for them."""
        self._steps.append(metrics)

    def means(self) -> dict[str, float]:
        """The mean of each metric over the window, which is then empty."""
        steps = jax.device_get(self._steps)
        self._steps = []
        return {name: float(np.mean([s[name] for s in steps])) for name in steps[0]}

    def __len__(self) -> int:
        return len(self._steps)


def step_flops(objective: str, forward: float, batch_size: int, attack_steps: int) -> float:
    """Floating-point operations of one update.

    forward: of one image's forward pass. A gradient costs one forward pass more for the inputs and
    one more for the weights: an attack step is 2 passes, an update 3 for each image it trains on.
    """
    attack = {"natural": 0, "trades": 1 + 2 * attack_steps}.get(objective, 2 * attack_steps)
    update = 6 if objective in ("trades", "mart") else 3
    return (attack + update) * forward * batch_size


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
        self._chance = 1 / num_classes
        self._losses: collections.deque[float] = collections.deque(maxlen=windows)
        self._accuracies: collections.deque[float] = collections.deque(maxlen=windows)
        self._said = False

    def check(self, means: dict[str, Any]) -> str | None:
        """A sentence where the last windows show a collapse, once; None otherwise.

        It has collapsed where the accuracy is at chance while the loss stands still: its mean over
        the newer half of the windows is within 1 % of the older half's.
        """
        self._losses.append(means["loss"])
        self._accuracies.append(max(means[n] for n in means if n.startswith("accuracy")))
        if self._said or len(self._losses) < self._losses.maxlen:
            return None
        half = len(self._losses) // 2
        older, newer = np.mean(list(self._losses)[:half]), np.mean(list(self._losses)[half:])
        accuracy = float(np.mean(self._accuracies))
        if accuracy > 1.25 * self._chance or abs(newer - older) > 0.01 * abs(older):
            return None
        self._said = True
        return (
            f"this run looks collapsed: training accuracy {accuracy:.1%} is at chance "
            f"({self._chance:.1%}) and the loss stands at {newer:.3f}; {CAUSES}"
        )


def diverged(step: int) -> str:
    """The sentence for a loss or gradient of NaN or infinity."""
    return f"the loss or its gradient is not finite at step {step}: training diverged; {CAUSES}"


def status_line(means: dict[str, float], epoch: float, epochs: int) -> str:
    """What stands beside the progress bar."""
    kind = "adv" if "accuracy_adv" in means else "clean"
    keep = f"keep {means['keep_probability']:.2f} " if "keep_probability" in means else ""
    return (
        f"epoch {epoch:.1f}/{epochs} loss {means['loss']:.3f} "
        f"{kind} {means[f'accuracy_{kind}']:.1%} "
        f"lr {means['learning_rate']:.2g} {keep}grad {means['gradient_norm']:.2f} "
        f"{means['images_per_second']:.0f} img/s"
    )
