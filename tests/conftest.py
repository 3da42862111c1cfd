"""Shared settings: 4 virtual CPU devices, and one compilation cache for all test processes."""

import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/vit_at_hypothesis")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from vit_at.flags import parse_flags

ROOT = pathlib.Path(__file__).parent.parent

CACHE = pathlib.Path(tempfile.gettempdir()) / "vit_at_test_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def parse(monkeypatch):
    """``parse(*arguments)`` -> the configuration, by fresh flags such as vit_at.main defines."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        assert parse_flags(sys.argv) == ["main"]
        return values.config

    return run
