"""The lease of a work directory in a bucket: held by one process, taken over from a dead one."""

import json
import os
import signal
import subprocess
import threading
import time

import gcs
import pytest

from vit_at.errors import UserError
from vit_at.workdir import lease

pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def storage():
    with gcs.connected() as storage:
        yield storage


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 1.0)


def test_a_directory_in_use_is_refused_and_free_afterwards(storage, quick):
    path = "gs://robots/leased/.training.lease"
    with lease.leased(path, "training"):
        says = rf"in use by another training \(process {os.getpid()}"
        with pytest.raises(UserError, match=says), lease.leased(path, "training"):
            pass
        assert "leased/.training.lease" in storage.objects
    assert "leased/.training.lease" not in storage.objects
    with lease.leased(path, "training"):
        pass


def test_the_lease_of_a_killed_process_is_taken_over(storage, quick):
    left = b'{"owner": "process 7 on elsewhere", "id": "x", "count": 3}'
    storage.put("dead/.training.lease", left)
    begin = time.monotonic()
    with lease.leased("gs://robots/dead/.training.lease", "training"):
        assert storage.objects["dead/.training.lease"].content != left
    assert time.monotonic() - begin >= 1.0


def test_a_process_whose_lease_was_taken_over_ends_and_leaves_it(storage, quick, monkeypatch):
    taken, signals = b'{"owner": "process 7 on elsewhere", "id": "x", "count": 3}', []
    monkeypatch.setattr(lease.os, "kill", lambda *arguments: signals.append(arguments))
    with lease.leased("gs://robots/taken/.training.lease", "training"):
        storage.put("taken/.training.lease", taken)
        deadline = time.monotonic() + 10
        while not signals and time.monotonic() < deadline:
            time.sleep(0.05)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert storage.objects["taken/.training.lease"].content == taken


def test_of_a_process_that_died_on_this_machine_at_once(storage):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = {"owner": "x", "id": "y", "count": 3, "pid": ended.pid, "machine": lease._machine()}
    storage.put("here/.training.lease", json.dumps(left).encode())
    begin = time.monotonic()
    with lease.leased("gs://robots/here/.training.lease", "training"):
        assert time.monotonic() - begin < lease.STALE / 4


def test_of_two_that_start_at_once_one_gets_the_lease(storage, quick):
    held, refused = [], []

    def start():
        try:
            with lease.leased("gs://robots/race/.training.lease", "training"):
                held.append(time.monotonic())
                time.sleep(2.5)
        except UserError:
            refused.append(time.monotonic())

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 2)
