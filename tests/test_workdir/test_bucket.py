"""A work directory in a bucket: a run, its resumption, damage and refusals."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import conftest
import gcs
import pytest
import runs
from etils import epath

from vit_at.errors import UserError
from vit_at.evaluate import evaluate
from vit_at.training.loop import Loop, train
from vit_at.workdir.checkpoint import load_trained, unreachable

pytest.importorskip("gcsfs")
OPTIONS = runs.QUICK | {"checkpoint__every_steps": 2, "eval__attacks": "clean"}
RECIPE = ["--config=configs/digits_sgd.py:smoke"]
LAST_STEP = 8


@pytest.fixture(scope="module")
def storage():
    with gcs.connected() as storage:
        yield storage


@pytest.fixture(autouse=True)
def in_order(storage):
    yield
    storage.failing, storage.readable, storage.writable = 0.0, True, True


def dying_at(step, patch):
    """Lets a run in this process end at a step as if it was killed: nothing is saved any more."""
    after_step = Loop._after_step

    def dies(loop, state, now, ending):
        if now == step:
            loop._checkpoints.close()  # else a thread of this process would go on to save
            raise RuntimeError("killed")
        after_step(loop, state, now, ending)

    patch.setattr(Loop, "_after_step", dies)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The arrays and records of an undisturbed run on a disk."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    records = train(runs.smoke(**OPTIONS), str(workdir))
    return runs.arrays_of(epath.Path(workdir), LAST_STEP), records


@pytest.fixture(scope="module")
def resumed(storage):
    """A run in the bucket, killed and resumed while 1 % of all requests fail; its records."""
    storage.failing = 0.01
    with pytest.MonkeyPatch.context() as patch:
        dying_at(5, patch)
        with pytest.raises(RuntimeError, match="killed"):
            train(runs.smoke(**OPTIONS), "gs://robots/resumed")
    records = train(runs.smoke(**OPTIONS), "gs://robots/resumed")
    assert storage.requests > 100
    storage.failing = 0.0
    return records


def test_a_killed_run_in_a_bucket_ends_as_an_undisturbed_one_on_a_disk(whole, resumed):
    runs.assert_same_arrays(runs.arrays_of(epath.Path("gs://robots/resumed"), LAST_STEP), whole[0])
    assert resumed == whole[1]


def test_its_files_are_there_and_no_lease_is_left(resumed, storage):
    names = {name.removeprefix("resumed/") for name in storage.objects if "resumed/" in name}
    assert {"config.json", "metrics.jsonl", "results.json", "per_example.npz"} <= names
    assert not [name for name in names if "lease" in name or "corrupt" in name]
    lines = epath.Path("gs://robots/resumed/metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert steps == list(range(1, LAST_STEP + 1))


def test_it_is_evaluated_in_the_bucket(resumed):
    (record,) = evaluate("gs://robots/resumed", "apgd-ce", num_examples=8)
    stored = json.loads(epath.Path("gs://robots/resumed/results.json").read_text())
    assert record in stored


def copied(storage, new):
    """Another name for the run."""
    for name in [name for name in storage.objects if name.startswith("resumed/")]:
        storage.put(f"{new}/{name.removeprefix('resumed/')}", storage.objects[name].content)
    return f"gs://robots/{new}"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_resumed(resumed, whole, storage):
    workdir = copied(storage, "damaged")
    arrays = f"damaged/checkpoints/last/{LAST_STEP}/params/d/"
    mine = [name for name in storage.objects if name.startswith(arrays)]
    largest = max(mine, key=lambda name: len(storage.objects[name].content))
    content = bytearray(storage.objects[largest].content)
    content[len(content) // 2] ^= 4
    storage.put(largest, bytes(content))
    train(runs.smoke(**OPTIONS), workdir)
    aside = {name for name in storage.objects if "damaged/checkpoints/corrupt" in name}
    assert largest.replace("/last/", "/corrupt/") in aside
    arrays = runs.arrays_of(epath.Path(workdir), LAST_STEP)
    assert all(value.tobytes() == whole[0][name].tobytes() for name, value in arrays.items())


def test_a_bucket_that_refuses_to_be_read_is_not_damage(resumed, storage, monkeypatch):
    workdir = copied(storage, "refused")
    before = dict(storage.objects)

    def refusing(*_, **__):
        raise ValueError("Error reading gs://robots/x: HTTP response code: 503 UNAVAILABLE")

    monkeypatch.setattr("vit_at.workdir.checkpoint.Series.restore", refusing)
    with pytest.raises(UserError, match=r"can't be read now .*503.*nothing was changed: run"):
        train(runs.smoke(**OPTIONS), workdir)
    with pytest.raises(UserError, match=r"can't be read now .*503"):
        load_trained(workdir, "last")
    assert {n: o.content for n, o in storage.objects.items()} == {
        n: o.content for n, o in before.items()
    }


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(5, "Input/output error"), True),
        (PermissionError(13, "Permission denied"), True),
        (TimeoutError("timed out"), True),
        (ValueError("UNAVAILABLE: Error reading gs://b/x"), True),
        (ValueError("HTTP response code: 429 with body"), True),
        (FileNotFoundError(2, "No such file"), False),
        (ValueError("the arrays of 'params' are not those that were saved"), False),
        (ValueError("DATA_LOSS: crc mismatch [tensorstore_spec='{503 UNAVAILABLE}']"), False),
        (KeyError("fingerprints"), False),
    ],
)
def test_what_is_damage_and_what_passes(error, passing):
    assert unreachable(error) == passing


# --- Kills ------------------------------------------------------------------------------------


CACHED = f"--compilation_cache={conftest.CACHE}"


def started(count, module, words, cache=(CACHED,), **environment):
    """A launcher of ``count`` processes of one device; its standard error is read later."""
    launcher = ["launch/local.py", f"-n{count}", "--devices=1", f"--module={module}", "--"]
    command = [sys.executable, *launcher, *words, *cache]
    environment |= dict.fromkeys(("FSSPEC_GS_TOKEN", "FSSPEC_GCS_TOKEN"), "anon")
    environment["XLA_FLAGS"] = ""
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=conftest.ROOT, env=os.environ | environment, **pipe)


def assert_ends(process):
    """Waits; it ends without an error."""
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


def killed(process, ready, choose=lambda children: children):
    """Whether some of its processes were killed, once it was ready, before it came to its end."""
    while process.poll() is None and not ready():
        time.sleep(0.01)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        for child in choose(children.split()):
            os.kill(int(child), signal.SIGKILL)
    said = process.communicate()[1]
    assert "corrupt" not in said
    assert process.returncode in (0, 128 + signal.SIGKILL), said
    return process.returncode != 0


@pytest.mark.campaign
@pytest.mark.parametrize("count", [1, 2])
def test_kills_at_any_moment_while_requests_fail_change_nothing(storage, tmp_path, count):
    """Training, then AutoAttack, killed 20 times in all while 5 % of the requests fail."""
    training = [*RECIPE, *runs.flags(OPTIONS)]
    attack = ["--attacks=autoattack", "--num_examples=20", "--batch_size=8"]
    moments, kills = random.Random(0), 0

    def commands(workdir):
        yield "vit_at.main", [*training, f"--workdir={workdir}"], 6, 800
        yield "vit_at.evaluate", [workdir, *attack], 4, 150

    def one(children):
        return [moments.choice(children)] if children else []

    whole = str(tmp_path / "whole")
    for module, words, _, _ in commands(whole):
        assert_ends(started(count, module, words))
    expected = runs.arrays_of(epath.Path(whole), LAST_STEP)
    storage.failing = 0.05
    for number in itertools.count():
        workdir = f"gs://robots/killed{count}_{number}"
        for module, words, times, most in commands(workdir):
            for _ in range(times):
                until = storage.requests + moments.randrange(count * most)
                process = started(count, module, words)
                kills += killed(process, lambda until=until: storage.requests >= until, one)
            assert_ends(started(count, module, words))
        runs.assert_same_arrays(runs.arrays_of(epath.Path(workdir), LAST_STEP), expected)
        files = [epath.Path(path) / "results.json" for path in (whole, workdir)]
        records = [json.loads(file.read_text()) for file in files]
        assert records[0] == records[1]
        if kills >= 20:
            break
    print(f"{kills} kills in {number + 1} runs, {storage.requests} requests")


@pytest.mark.slow
def test_four_then_one_then_two_processes_go_on_in_the_bucket(storage, tmp_path):
    """All killed in training, then in AutoAttack: 2, then 1."""
    workdir, options = "gs://robots/elastic", OPTIONS | {"epochs": 8}
    training = [*RECIPE, *runs.flags(options), f"--workdir={workdir}"]
    attack = [workdir, "--attacks=autoattack", "--num_examples=40", "--batch_size=8"]

    def saved():
        found = [re.match(r"elastic/checkpoints/last/(\d+)/", name) for name in [*storage.objects]]
        return max((int(match[1]) for match in found if match), default=0)

    assert killed(started(4, "vit_at.main", training), saved)
    first = saved()
    assert killed(started(1, "vit_at.main", training), lambda: saved() > first)
    assert saved() < 8 * 4
    assert_ends(started(2, "vit_at.main", training))
    reference = tmp_path / "reference"
    train(runs.smoke(**options), str(reference))
    assert runs.losses(workdir) == pytest.approx(runs.losses(reference), rel=1e-4)

    def slots(count):
        return [name for name in storage.objects if "slots_" in name and f"of-{count}" in name]

    assert killed(started(2, "vit_at.evaluate", attack), lambda: len(slots(2)) >= 2)
    assert_ends(started(1, "vit_at.evaluate", attack))
    assert not [name for name in storage.objects if "slots_" in name]
    interrupted = json.loads(epath.Path(f"{workdir}/results.json").read_text())[-1]
    epath.Path(f"{workdir}/autoattack").rmtree()
    epath.Path(f"{workdir}/results.json").unlink()
    assert_ends(started(1, "vit_at.evaluate", attack))
    assert json.loads(epath.Path(f"{workdir}/results.json").read_text())[-1] == interrupted


@pytest.mark.slow
def test_a_machine_that_never_compiled_the_step_finds_it_in_the_bucket(storage):
    words = [*RECIPE, *runs.flags(OPTIONS | {"epochs": 1}), "--workdir=gs://robots/warm"]
    assert_ends(started(1, "vit_at.main", words, cache=()))
    written = {n: o.generation for n, o in storage.objects.items() if n.startswith("warm/compiled")}
    assert any("train_step" in name for name in written)
    for name in [name for name in storage.objects if name.startswith("warm/")]:
        if name not in written:
            del storage.objects[name]
    assert_ends(started(1, "vit_at.main", words, cache=()))
    assert "warm/results.json" in storage.objects
    # What is not found is compiled, and written again.
    again = {name: storage.objects[name].generation for name in written}
    assert again == written


# --- Refusals ---------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_or_may_not_be_written(storage, command_fails):
    says = "error: the bucket 'nowhere' does not exist: create it, or correct the work directory"
    assert command_fails("gs://nowhere/run") == says
    storage.writable = False
    says = command_fails("gs://robots/forbidden")
    assert says.startswith("error: robots/forbidden can't be written (Forbidden: ")
    assert "storage.objects.create" in says
    assert not [name for name in storage.objects if name.startswith("forbidden/")]


@pytest.fixture
def command_fails(capfd):
    """Runs the training command in this process; its one sentence."""
    from vit_at import main

    def run(workdir):
        with pytest.raises(SystemExit) as ended:
            main.main([*RECIPE, *runs.flags(OPTIONS), f"--workdir={workdir}"])
        assert ended.value.code == 2
        lines = capfd.readouterr().err.strip().splitlines()
        return next(line for line in lines if line.startswith("error:"))

    return run
