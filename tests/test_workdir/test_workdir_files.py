"""Work directories: one process at a time, and an error if they can't be written."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
import runs
import tensorboardX
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.local import LocalFileSystem

from vit_at.attacks import Threat
from vit_at.config import ADDED, flatten, nested
from vit_at.errors import UserError
from vit_at.evaluation.protocol import Attack, record
from vit_at.training import metrics
from vit_at.training.loop import train
from vit_at.workdir.files import locked, read_config, write_config
from vit_at.workdir.results import Results

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import sys, time
from etils import epath
from vit_at.workdir.files import locked
with locked(epath.Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the work directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_work_directory_is_refused_while_another_process_uses_it(tmp_path, holder):
    with pytest.raises(UserError) as caught, locked(epath.Path(tmp_path), "training"):
        pass
    for part in ("in use by another training", f"process {holder.pid} on ", "choose another"):
        assert part in str(caught.value)
    with locked(epath.Path(tmp_path), "evaluation"):  # a lock of its own
        pass


def test_the_final_evaluation_waits_for_another_one(tmp_path, holder):
    threading.Timer(0.5, holder.kill).start()
    with locked(epath.Path(tmp_path), "training", wait=True):
        assert holder.wait(timeout=10) == -signal.SIGKILL


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(epath.Path(tmp_path), "training"):
        pass
    with locked(epath.Path(tmp_path), "training"):
        pass


def test_a_second_run_in_a_work_directory_is_refused(tmp_path, holder):
    with pytest.raises(UserError, match="in use by another training"):
        train(runs.smoke(**runs.QUICK), epath.Path(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {".training.lock"}


def test_a_work_directory_of_another_configuration_is_refused_with_the_fields(tmp_path):
    write_config(epath.Path(tmp_path), runs.resolved())
    write_config(epath.Path(tmp_path), runs.resolved())  # the same: resumes
    with pytest.raises(UserError) as caught:
        write_config(epath.Path(tmp_path), runs.resolved(epochs=3, data__std=(0.5,)))
    for part in ("data.std", "0.38", "0.5", "epochs 2 -> 3", "--workdir"):
        assert part in str(caught.value)


def test_the_configuration_comes_back_as_it_was(tmp_path):
    config = runs.resolved()
    write_config(epath.Path(tmp_path), config)
    stored = read_config(epath.Path(tmp_path))
    assert stored.is_locked
    assert stored.data.mean == config.data.mean
    assert stored.to_dict() == config.to_dict()


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        write_config(epath.Path(tmp_path), runs.resolved())


def test_a_run_from_before_a_field_existed_goes_on(tmp_path):
    config = runs.resolved(**runs.QUICK)
    write_config(epath.Path(tmp_path), config)
    path = tmp_path / "config.json"
    stored = flatten(json.loads(path.read_text()))
    old = nested({field: value for field, value in stored.items() if field not in ADDED})
    assert "threat" not in old["eval"]
    path.write_text(json.dumps(old))
    write_config(epath.Path(tmp_path), config)  # the same configuration still
    assert read_config(epath.Path(tmp_path)).to_dict() == config.to_dict()


@pytest.fixture
def read_only(tmp_path):
    """A read-only file system, where mounting is allowed."""
    with runs.mounted(tmp_path, "ro,size=1m") as directory:
        yield directory


def test_a_read_only_work_directory_is_one_error(read_only):
    with pytest.raises(UserError) as caught:
        train(runs.smoke(**runs.QUICK), read_only / "run")
    assert "could not be written, as it is not writable: choose another" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Object stores: a local stand-in for a bucket ---------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket, stored in tmp_path; as in an object store, files can't be appended to."""

    class Bucket(LocalFileSystem):
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs:/", str(tmp_path)).rstrip("/"))

        def open(self, path, mode="rb", **options):
            assert "a" not in mode
            return super().open(path, mode, **options)

    store = Bucket(auto_mkdir=True)
    monkeypatch.setattr(type(fsspec_backend), "fs", lambda self, path: store)
    monkeypatch.setattr(tensorboardX, "SummaryWriter", mock.MagicMock())
    return epath.Path("gs://bucket/run")


def test_files_of_a_run_work_in_an_object_store(bucket, tmp_path):
    config = runs.resolved(**runs.QUICK)
    write_config(bucket, config)
    assert read_config(bucket).to_dict() == config.to_dict()
    for first in (0, 2):
        writer = metrics.Writer(bucket, resumed_step=first)
        for step in range(first + 1, first + 4):
            writer.write(step, {"loss": 1.0})
        writer.close()
    lines = (tmp_path / "bucket" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    examples, results = runs.examples(5), Results(bucket)
    attack = Attack("clean", "clean", Threat("linf", 0.1, 0.1, 1))
    about = {"examples": examples, "seed": 0, "weights": {"digest": "d"}}
    entry = record(attack, np.ones(5, bool), **about)
    for _ in range(2):
        results.add(entry, np.ones(5, bool), examples)
    assert Results(bucket).records == [entry]
