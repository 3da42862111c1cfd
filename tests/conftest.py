"""Shared settings: 4 virtual CPU devices, and one compilation cache for all test processes."""

import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/vit_at_hypothesis")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
# Tests compile for most of their time, and this costs a quarter less. With 0, they test the
# programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

from vit_at import main
from vit_at.errors import one_sentence_errors

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # hlo, the reader of compiled programs

CACHE = pathlib.Path(tempfile.gettempdir()) / "vit_at_test_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forgets the compiled programs of earlier files before they crash the process.

    Each keeps about 25 memory maps or more, and of 65,530 (Linux's ``vm.max_map_count``) the
    compiler dies with a segmentation fault. What a later file needs again is in the cache.
    """
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def parse(monkeypatch):
    """``parse(*arguments)`` -> the configuration, as ``vit-at train`` reads its arguments."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        with one_sentence_errors():
            return main.parse(arguments)[0]

    return run
