"""The whole command: its files, resuming, interruption, divergence, and what it refuses."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import pytest
import runs
from etils import epath

from vit_at.config import CHECKPOINTS
from vit_at.errors import UserError
from vit_at.evaluation.protocol import weights_digest
from vit_at.training import metrics
from vit_at.training.loop import Loop, train
from vit_at.training.signals import Interrupted, Signals
from vit_at.workdir.checkpoint import Series, load_trained

ROOT = pathlib.Path(__file__).parents[2]
LAST_STEP = 8


def command(workdir, **changes):
    """The words of a shell that start ``train(runs.smoke(**QUICK | changes), workdir)``."""
    values = runs.QUICK | changes
    return [
        *(sys.executable, "-m", "vit_at.main", "--config=configs/digits_sgd.py:smoke"),
        *runs.flags(values),
        f"--workdir={workdir}",
        f"--compilation_cache={conftest.CACHE}",
    ]


def run(workdir, **changes):
    return subprocess.run(
        command(workdir, **changes), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def lines_of(workdir):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(work directory, records) of a run that nothing interrupted."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "undisturbed")
    return workdir, train(runs.smoke(**runs.QUICK), str(workdir))


def test_a_run_writes_every_file_of_its_work_directory(undisturbed):
    workdir, records = undisturbed
    names = {path.name for path in workdir.iterdir()} - {".training.lock", ".evaluation.lock"}
    expected = {"config.json", "parameters.txt", "checkpoints", "metrics.jsonl", "results.json"}
    expected |= {"per_example.npz", "per_example.csv"}
    assert expected <= names
    assert not [n for n in names - expected if not n.startswith("events.out")]
    config = json.loads((workdir / "config.json").read_text())
    resolved = runs.resolved(**runs.QUICK)
    assert config == json.loads(json.dumps(resolved.to_dict()))
    assert [record["attack"] for record in records] == ["clean", "cw-2", "pgd-2"]
    assert json.loads((workdir / "results.json").read_text()) == records


def test_every_step_and_validation_is_in_the_metrics(undisturbed):
    lines = lines_of(undisturbed[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, LAST_STEP + 1))
    for name in ("epoch", "accuracy_adv", "gradient_norm", "learning_rate", "images_per_second"):
        assert all(np.isfinite(line[name]) for line in steps)
    validations = [line for line in lines if "validation/clean" in line]
    assert [line["step"] for line in validations] == [4, 8]


def test_the_tested_weights_are_those_of_the_best_validation(undisturbed):
    workdir, records = undisturbed
    robust = {
        line["step"]: line["validation/pgd-2"]
        for line in lines_of(workdir)
        if "validation/pgd-2" in line
    }
    best = max(robust, key=robust.get)  # the first of equals
    for record in records:
        assert record["protocol"]["weights"]["checkpoint"] == "best"
        assert record["protocol"]["weights"]["step"] == best


def test_a_second_start_of_a_finished_run_changes_nothing(undisturbed):
    workdir, records = undisturbed
    before = {name: (workdir / name).read_bytes() for name in ("metrics.jsonl", "results.json")}
    assert train(runs.smoke(**runs.QUICK), workdir) == records
    for name, content in before.items():
        assert (workdir / name).read_bytes() == content


@pytest.mark.parametrize("step", [2, LAST_STEP])
def test_a_signal_while_a_step_is_awaited_or_logged_loses_nothing(tmp_path, monkeypatch, step):
    """It comes after the decision whether this step is saved; the last step always is."""
    log = Loop._log

    def signalled(loop, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(loop, now)

    monkeypatch.setattr(Loop, "_log", signalled)
    with pytest.raises(Interrupted):
        train(runs.smoke(**runs.QUICK), tmp_path)
    assert runs.arrays_of(epath.Path(tmp_path), min(step + 1, LAST_STEP))


def test_an_interrupted_run_goes_on_to_the_same_parameters(undisturbed, tmp_path, monkeypatch):
    """By a signal between two steps, in this process; see below for whole processes."""
    workdir, config = epath.Path(tmp_path), runs.smoke(**runs.QUICK)
    calls = []

    def interrupting(self, number=None, frame=None):
        calls.append(1)
        return signal.SIGTERM if len(calls) > 4 else None

    with monkeypatch.context() as patched:
        patched.setattr(Signals, "received", property(interrupting, lambda self, v: None), False)
        with pytest.raises(Interrupted) as interruption:
            train(config, workdir)
    assert interruption.value.exit_status == 128 + signal.SIGTERM
    stopped = max(line["step"] for line in lines_of(workdir))
    assert 0 < stopped < LAST_STEP
    assert runs.arrays_of(workdir, stopped)
    records = train(config, workdir)
    runs.assert_same_arrays(
        runs.arrays_of(workdir, LAST_STEP), runs.arrays_of(undisturbed[0], LAST_STEP)
    )
    assert [r["accuracy"] for r in records] == [r["accuracy"] for r in undisturbed[1]]
    steps = [line["step"] for line in lines_of(workdir) if "loss" in line]
    assert steps == list(range(1, LAST_STEP + 1))


LONG = {"epochs": 16, "checkpoint__every_minutes": 0.005}
LONG_STEPS = 64


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "long"
    ended = run(workdir, **LONG)
    assert ended.returncode == 0, ended.stderr
    assert "pgd-2" in ended.stdout
    return epath.Path(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_by_a_signal_resumes_bit_for_bit(
    undisturbed_long, tmp_path, number
):
    process = subprocess.Popen(
        command(tmp_path, **LONG),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (lines := lines_of(tmp_path)) or lines[-1]["step"] < 23:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=100)
    stopped = max(line["step"] for line in lines_of(tmp_path))
    assert stopped < LONG_STEPS
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert f"saved step {stopped}; the same command goes on from there" in said
        assert (tmp_path / "checkpoints" / "last" / str(stopped)).exists()
    assert "Traceback" not in said
    resumed = run(tmp_path, **LONG)
    assert resumed.returncode == 0
    assert "resuming at step " in resumed.stderr
    runs.assert_same_arrays(
        runs.arrays_of(epath.Path(tmp_path), LONG_STEPS),
        runs.arrays_of(undisturbed_long, LONG_STEPS),
    )
    steps = [line["step"] for line in lines_of(tmp_path) if "loss" in line]
    assert steps == list(range(1, LONG_STEPS + 1))


def test_signals_are_remembered_once_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_diverged_run_ends_with_status_3_and_keeps_no_broken_checkpoint(tmp_path):
    changes = {
        "optimizer__learning_rate": 1000.0,
        "optimizer__weight_decay": 1000.0,
        "optimizer__clip_norm": 0.0,
        "objective": "natural",
    }
    ended = run(tmp_path / "run", **changes)
    assert ended.returncode == 3
    last = ended.stderr.splitlines()[-1]
    assert "not finite at step 2" in last
    assert "optimizer.learning_rate" in last
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*/*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "natural"}, "config.objective 'at' -> 'natural'"),
        ({"seed": 7}, "config.seed 0 -> 7"),
        ({"data__train_split": "train[:192]"}, "data.images 128 -> 160"),
        ({"model__embed_dim": 32}, "config.model.embed_dim 16 -> 32"),
    ],
)
def test_checkpoints_of_another_run_are_left_alone(undisturbed, tmp_path, changes, said):
    """Also if config.json is gone, by which a work directory is usually known."""
    shutil.copytree(undisturbed[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(said)):
        train(runs.smoke(**runs.QUICK | changes), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    records = train(runs.smoke(**runs.QUICK), tmp_path / "run")
    assert records == undisturbed[1]


def test_a_work_directory_may_begin_with_a_tilde(undisturbed, monkeypatch):
    workdir, records = undisturbed
    monkeypatch.setenv("HOME", str(workdir.parent))
    assert train(runs.smoke(**runs.QUICK), "~/undisturbed") == records


def test_a_work_directory_of_another_configuration_is_left_alone(undisturbed):
    workdir, _ = undisturbed
    before = sorted(path.name for path in workdir.iterdir())
    ended = run(workdir, epochs=3)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: the work directory ")
    assert "epochs 2 -> 3" in last
    assert sorted(path.name for path in workdir.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 30}, "batch_size is 30, which 4 devices do not divide"),
        ({"model__patch_size": 3}, "model.patch_size 3 does not divide data.image_size 8"),
        ({"data__name": "cifar11"}, "cifar10"),
        ({"model__name": "deit_tny_patch16_224"}, "deit_tiny_patch16_224"),
        ({"model__pretrained": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"eval__attacks": "pdg-20"}, "attack 'pdg-20' is unknown"),
        ({"eval__validation_attack": "pgd-2,pgd-3"}, "it must be one attack"),
        ({"eval__num_examples": 1000}, "1000 examples"),
        ({"data__train_split": "tarin"}, "tarin"),
        ({"batch_size": 512}, "128 training examples"),
    ],
)
def test_what_does_not_fit_devices_data_or_model_is_refused_before_anything_is_written(
    tmp_path, changes, said
):
    with pytest.raises(ValueError, match=said):
        train(runs.smoke(**runs.QUICK | changes), epath.Path(tmp_path) / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_work_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    ended = run(tmp_path / "file")
    assert ended.returncode == 2
    assert "its path is a file: choose another --workdir" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_tests_run_on_four_devices():
    """What the tests of devices that do not divide, and of resuming, rest on."""
    assert len(jax.devices()) == 4
    assert "device_count=4" in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_run_that_overfits_to_its_attack_stops_and_keeps_the_best_weights(
    tmp_path, monkeypatch, capfd, which
):
    """Validation accuracy is made up; rerunning the command does not train on. The best weights are
    tested, whichever would be otherwise.
    """
    robust = iter([0.6, 0.7, 0.3, 0.9, 0.9])

    def made_up(evaluator, params, progress=False):
        yield "clean", np.full(10, True)
        yield "pgd-2", np.arange(10) < 10 * next(robust)

    monkeypatch.setattr("vit_at.training.loop.Evaluator.__call__", made_up)
    options = runs.QUICK | {"epochs": 5, "eval__attacks": "clean", "eval__num_examples": 0}
    config = runs.smoke(**options, eval__stop_if_overfitted=True, eval__checkpoint=which)
    records = train(config, str(tmp_path))
    assert "fell from 70.0% to 30.0%: catastrophic overfitting" in capfd.readouterr().err
    last = lines_of(tmp_path)[-1]
    assert last["epoch"] == 3
    assert records[0]["protocol"]["weights"] == records[0]["protocol"]["weights"] | {
        "checkpoint": "best",
        "step": last["step"] * 2 // 3,
    }
    assert train(config, str(tmp_path)) == records
    assert lines_of(tmp_path)[-1] == last
    assert next(robust) == 0.9
    assert load_trained(tmp_path).which == "best"


def test_a_state_is_saved_after_the_best_weights_that_it_names(tmp_path, monkeypatch):
    """Else a run killed between the two would go on without them."""
    save, named = Series.save, []

    def checked(series, step, trees, values):
        if len(trees) > 1:  # a whole state
            named.append(tmp_path / "checkpoints" / "best" / str(values["best"]["step"]))
            assert named[-1].is_dir()
        save(series, step, trees, values)

    monkeypatch.setattr(Series, "save", checked)
    train(runs.smoke(**runs.QUICK), str(tmp_path))
    assert named


def test_only_a_model_that_was_robust_can_lose_it():
    assert metrics.overfitted(0.2, 0.5, 10)
    assert not metrics.overfitted(0.26, 0.5, 10)
    assert not metrics.overfitted(0.01, 0.12, 10)


# objective, awp.gamma, data.extra.name, accumulate_steps, sharding, attack, threat.combine ('': one
# ball), whether a second phase changes the attack. Every pair of values is in one of the rows.
COMBINED = [
    ("at", 0.0, "", 2, "fsdp", "apgd", "max", True),
    ("at", 0.0, "", 2, "fsdp", "random", "", False),
    ("at", 0.01, "digits", 1, "replicated", "apgd", "", False),
    ("at", 0.01, "digits", 2, "replicated", "noise", "avg", False),
    ("mart", 0.0, "", 1, "replicated", "noise", "", True),
    ("mart", 0.0, "", 2, "fsdp", "random", "avg", False),
    ("mart", 0.01, "digits", 1, "fsdp", "apgd", "max", True),
    ("trades", 0.0, "digits", 1, "fsdp", "apgd", "avg", True),
    ("trades", 0.01, "", 1, "replicated", "random", "max", False),
    ("trades", 0.01, "digits", 2, "fsdp", "noise", "max", True),
    ("trades", 0.01, "digits", 2, "fsdp", "random", "", True),
]


@pytest.mark.slow
@pytest.mark.parametrize("row", COMBINED, ids=lambda row: "-".join(map(str, row)))
def test_what_goes_beyond_the_paper_resumes_bit_exactly(row, tmp_path, monkeypatch):
    objective, gamma, extra, parts, sharding, attack, combine, grows = row
    options = runs.QUICK | {
        "objective": objective,
        "mixing__probability": 0.0,
        "awp__gamma": gamma,
        "data__extra__name": extra,
        "data__extra__split": "train[160:320]",
        "data__extra__fraction": 0.5 if extra else 0.0,
        "accumulate_steps": parts,
        "sharding": sharding,
        "phases": "1 threat.steps=1 threat.eps=1/20" if grows else "",
        "ema_decay": 0.9,
        "optimizer__layer_decay": 0.8,
        "checkpoint__every_steps": 2,
        "eval__attacks": "clean",
    }
    options["threat__method" if attack == "apgd" else "threat__start"] = attack
    if combine:
        options |= {"threat__also": "l2:0.4:0.1", "threat__combine": combine}
    config = runs.smoke(**options)
    runs.assert_resumes_bit_exactly(config, tmp_path, monkeypatch, dies_at=5, last_step=LAST_STEP)


def test_the_rows_above_hold_every_pair():
    for a, b in itertools.combinations(range(len(COMBINED[0])), 2):
        seen = {(row[a], row[b]) for row in COMBINED}
        assert seen == set(itertools.product(*({row[i] for row in COMBINED} for i in (a, b))))


@pytest.mark.slow
def test_each_kind_of_weights_is_read_by_its_name(tmp_path):
    averaging = {"ema_decay": 0.8, "swa_epochs": 1.0, "eval__attacks": "clean"}
    records = train(runs.smoke(**runs.QUICK | averaging), str(tmp_path))
    read = {w: load_trained(tmp_path, w).params for w in CHECKPOINTS if w != "best"}
    digests = {which: weights_digest(params) for which, params in read.items()}
    assert digests["last"] == digests["last-swa"]
    assert len(set(digests.values())) == 3
    assert records[0]["protocol"]["weights"]["digest"] == weights_digest(
        load_trained(tmp_path, "best").params
    )


def test_averaged_weights_that_a_run_does_not_have(undisturbed):
    with pytest.raises(UserError, match="has no averaged weights 'swa'; set ema_decay or swa"):
        load_trained(undisturbed[0], "last-swa")
