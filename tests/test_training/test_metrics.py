"""What a run says of itself: means, files that survive a crash, the alarm, the estimate of cost."""

import io
import json
import logging
import os
import sys
import types

import jax.numpy as jnp
import pytest
import runs
from clu.metrics import Average, Collection
from etils import epath

from vit_at import console
from vit_at.errors import UserError
from vit_at.training import metrics


def of_step(**values):
    """The metrics of one step."""
    averages = {n: Average(jnp.float32(v), jnp.int32(1)) for n, v in values.items()}
    return Collection.create_collection(**averages)


def test_the_means_of_some_steps_are_those_of_their_metrics():
    steps = [of_step(loss=loss, eps=0.5) for loss in (1.0, 2.0, 6.0)]
    assert metrics.means(steps) == {"loss": 3.0, "eps": 0.5}
    assert metrics.means([of_step(loss=4.0)]) == {"loss": 4.0}
    assert all(type(mean) is float for mean in metrics.means(steps).values())


# --- Writer -----------------------------------------------------------------------------------


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_on_disk_at_once_and_events_at_the_end(tmp_path):
    writer = metrics.Writer(epath.Path(tmp_path), 0)
    writer.write(1, {"loss": 0.5})
    assert lines_of(tmp_path) == [{"step": 1, "loss": 0.5}]
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_a_resumed_writer_drops_later_lines_and_half_lines(tmp_path):
    kept = (
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "validation/clean": 1}\n'
    )
    later = '{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(kept + later)
    writer = metrics.Writer(epath.Path(tmp_path), 2)
    writer.write(3, {"loss": 1.5})
    writer.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 2, 3]
    assert lines_of(tmp_path)[-1] == {"step": 3, "loss": 1.5}


def test_a_half_line_without_a_later_step_is_dropped_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step"')
    metrics.Writer(epath.Path(tmp_path), 5).close()
    assert lines_of(tmp_path) == [{"step": 1, "loss": 3.0}]


class StandIn(types.ModuleType):
    """wandb as far as it is used; keeps what it gets. broken: the text of the error of init."""

    class Error(Exception):
        pass

    def __init__(self, broken=None):
        super().__init__("wandb")
        self.broken, self.started, self.logged, self.finished = broken, [], [], 0
        self.id = "abc123"

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        if self.broken:
            raise self.Error(self.broken)
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_metrics_go_to_wandb_and_a_resumed_run_continues_there(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resumed in (0, 1):
        writer = metrics.Writer(epath.Path(tmp_path), resumed, "vits", {"seed": 3})
        writer.write(resumed + 1, {"loss": 0.5, "note": "not a number"})
        writer.close()
    first, second = wandb.started
    assert first["project"] == second["project"] == "vits"
    assert first["config"] == {"seed": 3}
    assert (first["id"], second["id"]) == (None, "abc123")
    assert second["resume"] == "allow"
    assert wandb.logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert wandb.finished == 2
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_without_a_project_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics.check_wandb("")
    metrics.Writer(epath.Path(tmp_path), 0).close()
    assert not (tmp_path / metrics.WANDB_FILE).exists()


def test_an_error_of_wandb_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(broken="no API key\nmore"))
    with pytest.raises(
        UserError, match=r"\(no API key\); run 'wandb login', or set WANDB_MODE"
    ) as e:
        metrics.Writer(epath.Path(tmp_path), 0, "vits")
    assert "\n" not in str(e.value)


def test_wandb_itself_runs_offline_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resumed in (0, 1):
        writer = metrics.Writer(epath.Path(tmp_path), resumed, "vits", {"seed": 3})
        writer.write(resumed + 1, {"loss": 0.5})
        writer.close()
    known = (tmp_path / metrics.WANDB_FILE).read_text().strip()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith(known) for run in runs)


# --- Collapse ---------------------------------------------------------------------------------


def alarms(losses, accuracies, **more):
    collapse = metrics.Collapse(num_classes=10, windows=6)
    means = [
        {"loss": loss, "accuracy_adv": accuracy} | more
        for loss, accuracy in zip(losses, accuracies, strict=True)
    ]
    return [alarm for alarm in map(collapse.check, means) if alarm]


def test_a_run_that_stands_still_at_chance_is_called_collapsed_once():
    (alarm,) = alarms([2.303, 2.302] * 10, [0.1] * 20)
    assert "collapsed" in alarm
    assert "10.0%" in alarm
    assert "optimizer.learning_rate" in alarm


@pytest.mark.parametrize(
    ("losses", "accuracies"),
    [
        ([2.3 - 0.05 * i for i in range(20)], [0.1] * 20),  # the loss still falls
        ([2.3] * 20, [0.3] * 20),  # better than chance
        ([2.303] * 5, [0.1] * 5),  # too early to tell
    ],
)
def test_a_run_that_learns_is_not(losses, accuracies):
    assert alarms(losses, accuracies) == []


def test_the_better_of_clean_and_adversarial_accuracy_counts():
    assert alarms([2.303] * 20, [0.1] * 20, accuracy_clean=0.4) == []


# --- Text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (200_000, "55 h 33 min"),
    ],
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def passes_of(**changes):
    """Forward passes of an update, for each image of its batch."""
    config = runs.smoke(**changes)
    return metrics.step_flops(config, 1e9) / config.batch_size / 1e9


@pytest.mark.parametrize(
    ("objective", "passes"),
    [("natural", 3), ("at", 2 * 10 + 3), ("trades", 1 + 2 * 10 + 6), ("mart", 2 * 10 + 6)],
)
def test_step_flops_count_the_passes(objective, passes):
    assert passes_of(objective=objective, threat__steps=10) == passes


def test_auto_pgd_evaluates_its_last_point():
    assert passes_of(threat__method="apgd", threat__steps=2) == 2 * 2 + 1 + 3


def test_several_balls_cost_an_attack_each_and_the_choice_or_the_update():
    options = {"threat__steps": 10, "threat__also": "l2:0.5:0.1"}
    assert passes_of(**options) == 2 * (2 * 10 + 1) + 3
    assert passes_of(**options, threat__combine="avg") == 2 * (2 * 10 + 3)
    assert passes_of(**options, objective="trades") == 1 + 2 * (2 * 10 + 1) + 6


def test_adversarial_weight_perturbation_costs_a_second_gradient():
    options = {"threat__steps": 10, "awp__gamma": 0.01}
    assert passes_of(**options) == 2 * 10 + 2 * 3
    assert passes_of(**options, objective="trades") == 1 + 2 * 10 + 2 * 6


def test_the_estimate_names_parameters_steps_and_cost():
    line = metrics.cost_estimate(2e9, 1000, 12_345)
    for part in ("12,345 parameters", "2 GFLOP a step", "1,000 steps", "2 TFLOP in all"):
        assert part in line


def test_the_status_line_shows_what_there_is():
    means = {"loss": 1.5, "learning_rate": 0.1, "gradient_norm": 2.0, "images_per_second": 99.6}
    line = metrics.status_line(means | {"accuracy_adv": 0.25, "keep_probability": 0.5}, 1.25, 40)
    for part in ("epoch 1.2/40", "loss 1.500", "adv 25.0%", "lr 0.1", "keep 0.50", "100 img/s"):
        assert part in line
    assert "GiB" not in line
    assert "12.3 GiB" in metrics.status_line(
        means | {"accuracy_adv": 0.25, "device_memory_gib": 12.34}, 1.25, 40
    )
    natural = metrics.status_line(means | {"accuracy_clean": 0.5}, 1.0, 40)
    assert "clean 50.0%" in natural
    assert "keep" not in natural


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.Progress(10, 2, "step", every_seconds=30.0)
    for _ in range(8):
        now[0] += 16.0
        progress.update("loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "4/10  loss 1.0  1 min 36 s left"
    assert [line.split("/")[0] for line in lines] == ["4", "6", "8", "10"]


def test_the_time_left_leaves_out_compilation_and_what_is_discounted(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.Progress(100, unit="steps", every_seconds=30.0)
    now[0] = 600.0  # compiles
    progress.update("loss 2.0")
    for _ in range(20):
        now[0] += 2.0
        progress.update()
    now[0] += 500.0  # the first validation
    progress.discount(500.0)
    progress.update("loss 1.0")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "1/100  loss 2.0"  # the pace is not known yet
    left = 78 * 40.0 / 21  # 21 steps took 40 s
    assert second == f"22/100  loss 1.0  {console.duration(left)} left"


def test_progress_of_a_falling_total_is_an_upper_bound_and_goes_where_it_is_sent(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.Progress(0, at_most=True, enabled=False, write=lines.append)
    for done, total in ((10, 110), (20, 90), (40, 60)):
        now[0] += 40.0
        progress.update("apgd-ce", done=done, total=total)
    assert lines == [
        "10/110  apgd-ce",
        "20/90  apgd-ce  at most 4 min 40 s left",
        "40/60  apgd-ce  at most 53 s left",
    ]


def test_progress_on_a_terminal_is_one_bar_with_the_same_text(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    now, terminal = [0.0], Terminal()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = console.Progress(4, unit="steps")
    for _ in range(3):
        now[0] += 10.0
        progress.update("loss 1.0")
    progress.say("epoch 1")
    progress._bar.refresh()
    progress.close()
    shown = terminal.getvalue()
    assert "3/4 steps, loss 1.0  10 s left" in shown
    assert "epoch 1\n" in shown


class Device:
    """Of an accelerator, or of a CPU, which has no statistics."""

    def __init__(self, peak=None):
        self._peak = peak

    def memory_stats(self):
        return None if self._peak is None else {"peak_bytes_in_use": self._peak}


def test_device_memory_is_that_of_the_fullest_device_where_devices_say():
    found = metrics.device_memory([Device(2**30), Device(3 * 2**30), Device()])
    assert found == {"device_memory_gib": 3.0}
    assert metrics.device_memory([Device()]) == {}


@pytest.mark.parametrize(
    ("path", "level", "shown"),
    [
        (console.__file__, logging.INFO, True),
        # A virtual environment inside of a checkout, as the README makes it.
        ("/vit_at/.venv/site-packages/tensorflow_datasets/core.py", logging.INFO, False),
        ("/vit_at/.venv/site-packages/tensorflow_datasets/core.py", logging.WARNING, True),
        ("/site-packages/orbax/checkpoint.py", logging.ERROR, False),
    ],
)
def test_messages_of_other_libraries_are_shown_from_warnings_up(path, level, shown):
    record = logging.LogRecord("absl", level, path, 1, "a message", (), None)
    assert console._ours(record) == shown
