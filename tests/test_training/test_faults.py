"""A fault campaign: processes are killed at random moments, and no result changes.

A run is started repeatedly in one work directory, and killed at a random moment or while it writes
a checkpoint. The last start runs to the end. Its result must equal that of an undisturbed run, bit
for bit.
``pytest -m slow -n 0 -s tests/test_training/test_faults.py`` is the whole campaign; it prints the
counts that docs/reliability.md reports.
"""

import contextlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import conftest
import numpy as np
import pytest
import runs
from etils import epath

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",  # no virtual devices
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_COMPILATION_CACHE_DIR": str(conftest.CACHE),
}
TRAINING = runs.QUICK | {
    "epochs": 10,
    "eval__every_epochs": 5,
    "eval__attacks": "clean,pgd-2",
    "checkpoint__every_steps": 2,
}
LAST_STEP = 40


def training(workdir, processes: int = 1) -> list[str]:
    """The command of the run."""
    fields = runs.flags(TRAINING)
    words = ["--config=configs/digits_sgd.py:smoke", *fields, f"--workdir={workdir}"]
    words.append(f"--compilation_cache={conftest.CACHE}")
    if processes == 1:
        return [sys.executable, "-m", "vit_at.main", *words]
    return [sys.executable, "launch/local.py", f"-n{processes}", "--devices=1", "--", *words]


def evaluation(workdir) -> list[str]:
    words = ["--attacks=autoattack", "--num_examples=20", "--batch_size=8"]
    return [sys.executable, "-m", "vit_at.evaluate", str(workdir), *words]


def to_the_end(command) -> float:
    """Runs a command undisturbed; the seconds it took."""
    begin = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return time.monotonic() - begin


class Campaign:
    """Starts a command repeatedly and sends it a signal; counts what happened.

    A third of the signals come at any moment, a third after the first step, and a third during the
    next write of a checkpoint. A run that finishes first is checked and started anew.
    """

    def __init__(self, command, workdir, number, allowed, check=None, seed: int = 0):
        """allowed: exit statuses after the signal; check: called after a run finished first."""
        self._command, self._workdir, self._number = command, pathlib.Path(workdir), number
        self._allowed, self._check, self._random = allowed, check, random.Random(seed)
        self.counts = {"signals": 0, "while working": 0, "while writing": 0, "finished first": 0}

    def run(self, times: int, seconds: float) -> dict[str, int]:
        """Sends ``times`` signals; seconds: duration of an undisturbed run."""
        moments = itertools.cycle(("any", "working", "writing"))
        while self.counts["signals"] < times:
            self.once(next(moments), seconds)
        return self.counts

    def once(self, moment: str, seconds: float) -> None:
        """One start, and a signal unless the run finishes first."""
        stamp = self._stamp()
        process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._wait_for(process, moment, seconds, stamp)
        working, writing = self._stamp() != stamp, self._is_writing()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(self._number)
        said = process.communicate(timeout=120)[1]
        assert "corrupt" not in said
        assert "Traceback" not in said, said
        if process.returncode == 0:
            self.counts["finished first"] += 1
            if self._check:
                self._check()
            return
        assert process.returncode in self._allowed, said
        self.counts["signals"] += 1
        self.counts["while working"] += working
        self.counts["while writing"] += writing

    def _wait_for(self, process, moment, seconds, stamp) -> None:
        delay = self._random.uniform(0, seconds)
        if moment != "any":
            while process.poll() is None and self._stamp() == stamp:
                time.sleep(0.002)
            delay = self._random.uniform(0, 0.3 * seconds)
        deadline = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        while moment == "writing" and process.poll() is None and not self._is_writing():
            time.sleep(0.0005)

    def _stamp(self):
        """Modification times of the metrics or the ledger, which change with progress."""
        files = (self._workdir / "metrics.jsonl", *self._workdir.glob("autoattack/*/ledger.npz"))
        return [file.stat().st_mtime_ns for file in files if file.exists()]

    def _is_writing(self) -> bool:
        partial = ("checkpoints/*/*.orbax-checkpoint-tmp*", "autoattack/*/.*.partial")
        return any(found for pattern in partial for found in self._workdir.glob(pattern))


def assert_same_training(workdir, reference):
    """Compares every array bit for bit, every loss and every outcome."""
    runs.assert_same_arrays(
        *(runs.arrays_of(epath.Path(w), LAST_STEP) for w in (workdir, reference))
    )
    losses = [
        [(line["step"], line["loss"]) for line in lines_of(w) if "loss" in line]
        for w in (workdir, reference)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == LAST_STEP
    assert_same_outcomes(workdir, reference, "per_example.npz")
    assert not (pathlib.Path(workdir) / "checkpoints" / "corrupt").exists()


def lines_of(workdir):
    return map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())


def assert_same_outcomes(workdir, reference, pattern):
    files = sorted(path.relative_to(reference) for path in pathlib.Path(reference).glob(pattern))
    assert files
    for file in files:
        with np.load(workdir / file) as ours, np.load(reference / file) as theirs:
            assert ours.files == theirs.files
            for name in theirs.files:
                np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The work directory of an undisturbed run, which also fills the compilation cache."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    to_the_end(training(workdir))
    return workdir


def disturb(undisturbed, workdir, number, times, allowed):
    seconds = to_the_end(training(workdir.parent / "again"))

    def check():
        assert_same_training(workdir, undisturbed)

    def check_and_begin_anew():
        check()
        shutil.rmtree(workdir)

    campaign = Campaign(training(workdir), workdir, number, allowed, check_and_begin_anew)
    counts = campaign.run(times, seconds)
    to_the_end(training(workdir))
    check()
    print(f"\n{signal.Signals(number).name} in training: {counts}")


@pytest.mark.slow
def test_killed_while_it_writes_checkpoints_a_run_loses_nothing(undisturbed, tmp_path):
    """A short campaign: one kill in the middle of the run, one during a write."""
    workdir = tmp_path / "run"
    campaign = Campaign(training(workdir), workdir, signal.SIGKILL, {-signal.SIGKILL})
    for moment in ("writing", "working"):
        campaign.once(moment, 1.0)
    assert campaign.counts["while working"] == 2
    assert campaign.counts["while writing"] >= 1
    to_the_end(training(workdir))
    assert_same_training(workdir, undisturbed)


@pytest.mark.campaign
def test_kill_9_at_fifty_moments_of_training(undisturbed, tmp_path):
    disturb(undisturbed, tmp_path / "run", signal.SIGKILL, 50, {-signal.SIGKILL})


@pytest.mark.campaign
def test_sigterm_at_twenty_moments_of_training(undisturbed, tmp_path):
    """The exit status is 143, or the signal's own while Python still imports."""
    disturb(undisturbed, tmp_path / "run", signal.SIGTERM, 20, {143, -signal.SIGTERM})


@pytest.mark.campaign
def test_kill_9_at_twenty_moments_of_autoattack(undisturbed, tmp_path):
    for name in ("warm", "reference", "run"):
        shutil.copytree(undisturbed, tmp_path / name)
    to_the_end(evaluation(tmp_path / "warm"))
    seconds = to_the_end(evaluation(tmp_path / "reference"))
    workdir = tmp_path / "run"

    def check():
        assert_same_outcomes(workdir, tmp_path / "reference", "autoattack/*/per_example.npz")
        assert_same_outcomes(workdir, tmp_path / "reference", "per_example.npz")

    def check_and_begin_anew():
        check()
        shutil.copytree(undisturbed, tmp_path / "next")
        shutil.rmtree(workdir)
        (tmp_path / "next").rename(workdir)

    campaign = Campaign(
        evaluation(workdir), workdir, signal.SIGKILL, {-signal.SIGKILL}, check_and_begin_anew
    )
    counts = campaign.run(20, seconds)
    to_the_end(evaluation(workdir))
    check()
    print(f"\nSIGKILL in AutoAttack: {counts}")


@pytest.mark.campaign
def test_one_of_two_processes_killed_five_times(tmp_path):
    """The other process ends with a message; the resumed pair gives the undisturbed result."""
    workdir, chance = tmp_path / "run", random.Random(0)
    seconds, waits = to_the_end(training(tmp_path / "reference", processes=2)), []
    for _ in range(5):
        process = subprocess.Popen(
            training(workdir, processes=2),
            cwd=ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(chance.uniform(0.5, 0.8) * seconds)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        if process.poll() is None and len(children.split()) == 2:
            os.kill(int(children.split()[1]), signal.SIGKILL)
        begin = time.monotonic()
        said = process.communicate(timeout=120)[1]
        if process.returncode == 0:
            continue
        waits.append(time.monotonic() - begin)
        assert "is gone without a message" in said or "could not reach" in said, said
        assert "Traceback" not in said, said
    to_the_end(training(workdir, processes=2))
    assert_same_training(workdir, tmp_path / "reference")
    print(f"\none of two killed {len(waits)} times; the other ended within {max(waits):.1f} s")
