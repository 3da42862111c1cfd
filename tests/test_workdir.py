"""Work directories: used by one process at a time, and a sentence where they can't be written."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import runs
from etils import epath

from vit_at.config import UserError
from vit_at.train import train
from vit_at.workdir import locked

ROOT = pathlib.Path(__file__).parent.parent
HOLD = """
import sys, time
from etils import epath
from vit_at.workdir import locked
with locked(epath.Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the work directory."""
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
    with locked(epath.Path(tmp_path), "evaluation"):  # which does not disturb training
        pass


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
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", ".training.lock"}


@pytest.fixture
def read_only(tmp_path):
    """A mounted file system that can't be written, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    yield epath.Path(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_read_only_work_directory_is_one_sentence(read_only):
    with pytest.raises(UserError) as caught:
        train(runs.smoke(**runs.QUICK), read_only / "run")
    assert "could not be written, as it may not be written: choose another" in str(caught.value)
    assert "\n" not in str(caught.value)
