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


@pytest.fixture
def parse(monkeypatch):
    """``parse(*arguments)`` -> the configuration, as ``vit-at train`` reads its arguments."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        with one_sentence_errors():
            return main.parse(arguments)[0]

    return run
