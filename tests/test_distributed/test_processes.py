"""Several processes: they connect or name who is missing, agree, and end together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import conftest
import numpy as np
import pytest
import runs
from etils import epath

from vit_at import weights
from vit_at.distributed import processes, rendezvous
from vit_at.errors import UserError
from vit_at.training.loop import train
from vit_at.workdir.checkpoint import load_trained

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ["--config=configs/digits_sgd.py:smoke", *runs.flags(runs.QUICK)]
RECIPE += [f"--compilation_cache={conftest.CACHE}"]

CIFAR10 = [
    "--config=configs/cifar10_sgd.py:ard_prm,scratch",
    f"--config.data.dir={runs.TFDS}",
    "--config.data.train_split=train[:288]",
    "--config.data.validation_examples=32",
    "--config.data.test_split=test[:64]",
    "--config.model.embed_dim=32",
    "--config.model.depth=2",
    "--config.model.num_heads=2",
    "--config.epochs=1",
    "--config.batch_size=32",
    "--config.log_every_steps=1",
    "--config.masking.warmup_epochs=1",
    "--config.threat.steps=3",
    "--config.eval.attacks=clean,pgd-3",
    "--config.eval.batch_size=32",
    f"--compilation_cache={conftest.CACHE}",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- Connecting: threads stand in for processes -----------------------------------------------


def connect(count: int, who, seconds: float = 20.0, claims=None):
    """{process: connections, or the error's text} of processes ``who``; claims: their counts."""
    port, found = free_port(), {}

    def attempt(process):
        believed = (claims or {}).get(process, count)
        try:
            found[process] = rendezvous.connect("127.0.0.1", port, believed, process, seconds)
        except UserError as error:
            found[process] = str(error)

    threads = [threading.Thread(target=attempt, args=(p,)) for p in reversed(who)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_process_has_a_connection_to_process_0():
    found = connect(3, [0, 1, 2])
    assert sorted(connection.process for connection in found[0]) == [1, 2]
    for process in (1, 2):
        (connection,) = found[process]
        connection.send(hello=process)
        mine = next(other for other in found[0] if other.process == process)
        assert mine.receive(5) == {"hello": process}


def test_every_process_names_the_missing_ones_in_time():
    begin = time.monotonic()
    found = connect(4, [0, 2], seconds=1)
    assert time.monotonic() - begin < 5
    assert "2 of 4 processes did not connect within 1 s (process 1, 3)" in found[0]
    assert found[2] == found[0]


def test_a_process_without_process_0_says_what_it_could_not_reach():
    found = connect(2, [1], seconds=1)
    assert "process 1 of 2 could not reach process 0 at 127.0.0.1:" in found[1]
    assert "within 1 s" in found[1]


def test_processes_that_disagree_on_their_number_are_refused():
    found = connect(3, [0, 1], claims={1: 2})
    assert "process 1 of 2 connected to a run of 3 processes" in found[0]
    assert found[1] == found[0]


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 can't listen on port {port}"):
            rendezvous.connect("127.0.0.1", port, 2, 0, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"coordinator": "a:1"}, "go together"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id 2 of 2"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        processes.initialize(**flags)


def test_slurm_is_recognised(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[03-04]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    address, count, process, _ = processes._detected(1)
    assert (address.partition(":")[0], count, process) == ("node03", 2, 1)
    for name in slurm:
        monkeypatch.delenv(name)
    assert processes._detected(1)[1] == 1
    processes.initialize()  # nothing to do
    processes.initialize(num_processes=1)


# --- Ending together --------------------------------------------------------------------------

STAND_IN = """
import os, sys, time
from vit_at.distributed import rendezvous, processes
from vit_at.errors import UserError
port, process, deed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
connections = rendezvous.connect("127.0.0.1", port, 2, process, 20)
processes._peers = processes.Peers(2, connections)
with processes.shared_exit():
    if process == 1:
        if deed == "kill":
            os.kill(os.getpid(), 9)
        if deed == "mistake":
            raise UserError("eps is 8")
        if deed == "terminate":
            processes.end_on_sigterm()
            os.kill(os.getpid(), 15)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("deed", "statuses", "said"),
    [
        ("kill", [processes.EXIT_LOST, -9], "error: process 1 of 2 is gone without a message"),
        ("mistake", [2, 2], "error: eps is 8"),
        ("terminate", [143, 143], "ended by signal 15"),
    ],
)
def test_what_ends_one_process_ends_the_other_with_a_sentence_at_once(deed, statuses, said):
    port, begin = str(free_port()), time.monotonic()
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", STAND_IN, port, str(process), deed],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    stderr = [process.communicate(timeout=60)[1] for process in pair]
    assert [process.returncode for process in pair] == statuses
    assert time.monotonic() - begin < 50
    assert said in stderr[0]
    assert "Traceback" not in stderr[0] + stderr[1]


# --- Whole runs -------------------------------------------------------------------------------


def local(count: int, *arguments, module="vit_at.main", devices=1, timeout=400, **options):
    """launch/local.py with these words."""
    command = [sys.executable, "launch/local.py", f"-n{count}", f"--devices={devices}"]
    command += [f"--module={module}", "--", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **options
    )


def outcomes(workdir) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(workdir) / "per_example.npz") as archive:
        return {name: archive[name] for name in archive.files if name.endswith("/correct")}


def assert_same_outcomes(a, b):
    """By attack and image; the weights' digests in the names differ by rounding."""
    by_attack = [{name.partition("/")[2]: v for name, v in outcomes(w).items()} for w in (a, b)]
    assert by_attack[0].keys() == by_attack[1].keys()
    assert by_attack[0]
    for name, correct in by_attack[0].items():
        np.testing.assert_array_equal(correct, by_attack[1][name])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, with four devices."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "alone")
    train(runs.smoke(**runs.QUICK), workdir)
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(work directory, how it ended) of the same run by two processes of one device."""
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    return workdir, local(2, *RECIPE, f"--workdir={workdir}")


def test_two_processes_reach_the_losses_and_outcomes_of_one(alone, pair):
    workdir, ended = pair
    assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(runs.losses(workdir), runs.losses(alone), rtol=1e-5)
    assert_same_outcomes(workdir, alone)
    assert ended.stdout.count("results: ") == 1  # process 0 alone speaks
    assert ended.stderr.count("work directory ") == 1


def test_a_batch_that_does_not_divide_is_said_on_every_process(tmp_path):
    ended = local(2, *RECIPE, "--config.batch_size=31", f"--workdir={tmp_path / 'run'}")
    assert ended.returncode == 2
    assert "batch_size is 31, which 2 devices do not divide" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "batch"), [(2, 1, 8), (4, 1, 8), (2, 8, 16)])
def test_evaluation_and_autoattack_give_the_same_for_every_image(
    alone, tmp_path, count, devices, batch
):
    import shutil

    words = ["--attacks=clean,pgd-3,autoattack", "--num_examples=13", f"--batch_size={batch}"]
    for name in ("one", "many"):
        shutil.copytree(alone, tmp_path / name)
        for file in ("results.json", "per_example.npz"):
            (tmp_path / name / file).unlink()
    for name, processes_, each in (("one", 1, 1), ("many", count, devices)):
        ended = local(processes_, tmp_path / name, *words, module="vit_at.evaluate", devices=each)
        assert ended.returncode == 0, ended.stderr
    assert_same_outcomes(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_four_processes_reach_the_losses_of_one(alone, tmp_path, kind):
    ended = local(4, *RECIPE, f"--config.sharding={kind}", f"--workdir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(runs.losses(tmp_path / "run"), runs.losses(alone), rtol=1e-5)
    assert_same_outcomes(tmp_path / "run", alone)


@pytest.fixture
def one_core():
    """Restricts this process, and those that it starts, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_pretrained_weights_reach_every_process(alone, tmp_path):
    trained = load_trained(alone, "best")
    np.savez(tmp_path / "weights.npz", **weights.to_timm(trained.params, trained.model))
    words = [*RECIPE, f"--config.model.pretrained={tmp_path / 'weights.npz'}"]
    for count in (1, 2):
        ended = local(count, *words, f"--workdir={tmp_path / str(count)}")
        assert ended.returncode == 0, ended.stderr
    one, two = (runs.losses(tmp_path / name) for name in ("1", "2"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert one[0] < runs.losses(alone)[0]


@pytest.mark.slow
def test_both_series_write_the_same_step_at_a_time(one_core, tmp_path):
    """On a slow machine the best weights are still being written when the last ones begin."""
    often = {"epochs": 10, "eval.every_epochs": 5, "checkpoint.every_steps": 2}
    fields = [f"--config.{name}={value}" for name, value in often.items()]
    ended = local(2, *RECIPE, *fields, f"--workdir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stderr
    assert len(runs.losses(tmp_path / "run")) == 40


@pytest.fixture(scope="module")
def cifar10_alone(tmp_path_factory):
    """A run of one process with one device on real photographs."""
    workdir = tmp_path_factory.mktemp("runs") / "cifar10"
    ended = local(1, *CIFAR10, f"--workdir={workdir}")
    assert ended.returncode == 0, ended.stderr
    return workdir


@pytest.mark.slow
@runs.needs_tfds
@pytest.mark.parametrize("count", [2, 4])
def test_cifar10_on_several_processes(cifar10_alone, tmp_path, count):
    ended = local(count, *CIFAR10, f"--workdir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stderr
    assert len(runs.losses(cifar10_alone)) == 8
    np.testing.assert_allclose(runs.losses(tmp_path / "run"), runs.losses(cifar10_alone), rtol=1e-5)
    assert_same_outcomes(tmp_path / "run", cifar10_alone)


@pytest.mark.slow
def test_sigterm_on_one_of_two_saves_jointly_and_one_then_four_devices_go_on(alone, tmp_path):
    """2 processes -> 1 device -> 4 devices, each ended by SIGTERM but the last."""
    workdir = tmp_path / "run"
    command = [sys.executable, "launch/local.py", "-n2", "--devices=1", "--", *RECIPE]
    long = [*RECIPE, "--config.epochs=12", f"--workdir={workdir}"]
    command = [*command[:5], *long]
    for stage in range(2):
        begin = len(runs.losses(workdir)) if stage else 0
        words = command if stage == 0 else [sys.executable, "-m", "vit_at.main", *long]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        while (
            not workdir.joinpath("metrics.jsonl").exists() or len(runs.losses(workdir)) < begin + 6
        ):
            assert process.poll() is None
            time.sleep(0.05)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        target = int(children.read_text().split()[1]) if stage == 0 else process.pid
        os.kill(target, signal.SIGTERM)  # on process 1 only
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 143, said
        assert said.count("saved step") == 1
        assert "Traceback" not in said
    train(runs.smoke(**runs.QUICK | {"epochs": 12}), epath.Path(workdir))
    reference = epath.Path(tmp_path / "reference")
    train(runs.smoke(**runs.QUICK | {"epochs": 12}), reference)
    np.testing.assert_allclose(runs.losses(workdir), runs.losses(reference), rtol=1e-4)
