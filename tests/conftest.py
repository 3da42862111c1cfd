"""Shared settings: 4 virtual CPU devices, and one compilation cache for all test processes."""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax

CACHE = pathlib.Path(tempfile.gettempdir()) / "vit_at_test_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
