"""Configures JAX and XLA before JAX is first used.

XLA's CPU backend runs only some operations on several threads. So each core becomes a device with
its own share of the batch (1.2 to 1.3 times faster on two cores, docs/performance.md). Compiled
programs are cached on disk, or in the bucket of the run, and memory that the compiler has freed is
given back to the system. Other flags of XLA were tried without gain.

The user's environment wins: JAX_NUM_CPU_DEVICES, or --xla_force_host_platform_device_count in
XLA_FLAGS, for the devices, and JAX_COMPILATION_CACHE_DIR for the cache.
"""

import contextlib
import ctypes
import math
import os
import warnings

import jax

from vit_at.schema import is_remote

CACHE = os.path.join("~", ".cache", "vit_at")
COMPILED = "compiled"
_DEVICE_COUNT_FLAG = "xla_force_host_platform_device_count"
# With fewer images per core, splitting costs more than it gains.
_IMAGES_PER_CORE = 8
_COMPILATION = "/jax/core/compile/backend_compile_duration"
_LONG_COMPILATION = 0.5  # seconds; trimming takes a tenth of a second


def configure(*batch_sizes: int, cache: str | None = None, workdir: str = "") -> None:
    """Makes each CPU core a device, and turns on the compilation cache.

    Args:
      batch_sizes: the number of devices divides each of them, so it may be less than the cores.
      cache: directory of compiled programs; '': none; None: CACHE, or for a work directory in a
        bucket ``compiled`` in it, where a machine that has never compiled the step finds it.
      workdir: the work directory.
    """
    if cache is None:
        cache = f"{workdir.rstrip('/')}/{COMPILED}" if is_remote(workdir) else CACHE
        if is_remote(workdir):  # what is wrong with the bucket is said of the run, in one sentence
            warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
    flags = os.environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT_FLAG not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", cpu_devices(cores(), *batch_sizes))
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    jax.monitoring.register_event_duration_secs_listener(_trim_after_compilation)


def cores() -> int:
    """The number of cores that this process may use, which a scheduler can restrict."""
    allowed = getattr(os, "sched_getaffinity", None)  # macOS lacks it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _trim_after_compilation(event: str, duration: float, **_: object) -> None:
    """Gives freed memory back; otherwise it counts towards the peak of the first step."""
    if event == _COMPILATION and duration > _LONG_COMPILATION:
        with contextlib.suppress(AttributeError, OSError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def cpu_devices(cores: int, *batch_sizes: int) -> int:
    """The largest number of devices, up to ``cores``, that divides all batches into useful parts.

    Without batch sizes it is a power of two.
    """
    if not batch_sizes:
        return 1 << (cores.bit_length() - 1)
    common = math.gcd(*batch_sizes)
    fitting = (n for n in range(1, cores + 1) if common % n == 0 and common >= n * _IMAGES_PER_CORE)
    return max(fitting, default=1)
