"""How many devices a CPU becomes, and where compiled programs are kept."""

import os
import pathlib
import subprocess
import sys

import pytest

from vit_at.distributed import devices
from vit_at.distributed.devices import cpu_devices

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("cores", "batches", "expected"),
    [
        (1, (64,), 1),
        (2, (64, 256), 2),
        (12, (64, 256), 8),  # 12 does not divide 64; 8 leaves 8 images each
        (64, (64, 256), 8),
        (64, (1024, 1024), 64),
        (4, (30, 256), 1),  # parts of the common divisor 2 would be too small
        (4, (48, 48), 4),
        (2, (7,), 1),
        (3, (), 2),
        (1, (), 1),
        (8, (), 8),
    ],
)
def test_every_batch_divides_over_the_devices_in_parts_worth_splitting(cores, batches, expected):
    assert cpu_devices(cores, *batches) == expected


def printed(where="cache='/tmp/somewhere'", **environment):
    """What a fresh process says of its devices and cache."""
    code = (
        "from vit_at.distributed import devices, sharding; import jax;"
        f"devices.configure(64, {where}); "
        "print(sharding.make_mesh().size, jax.config.jax_compilation_cache_dir)"
    )
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("workdir", "cache"),
    [
        ("gs://bucket/run/", "gs://bucket/run/compiled"),
        ("runs/digits", os.path.expanduser("~/.cache/vit_at")),
    ],
)
def test_programs_are_kept_on_the_machine_or_in_the_bucket_of_the_run(workdir, cache):
    assert printed(f"workdir='{workdir}'")[1] == cache


def test_each_core_is_a_device():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert printed() == [str(cpu_devices(cores, 64)), "/tmp/somewhere"]


@pytest.mark.parametrize(
    "setting",
    [
        {"JAX_NUM_CPU_DEVICES": "3"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
    ],
)
def test_a_users_own_settings_win(setting):
    assert printed(**setting, JAX_COMPILATION_CACHE_DIR="/tmp/mine") == ["3", "/tmp/mine"]


def test_memory_is_given_back_after_a_long_compilation(monkeypatch):
    trimmed = []

    class Libc:
        def malloc_trim(self, kept):
            trimmed.append(kept)

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Libc())
    for event, seconds in (("/jax/other", 9.0), (devices._COMPILATION, 0.01)):
        devices._trim_after_compilation(event, seconds, fun_name="jit(f)")
    assert trimmed == []
    devices._trim_after_compilation(devices._COMPILATION, 9.0, fun_name="jit(f)")
    assert trimmed == [0]


def test_a_c_library_without_trimming_is_no_error(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())
    devices._trim_after_compilation(devices._COMPILATION, 9.0)
