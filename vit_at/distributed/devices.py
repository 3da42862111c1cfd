"""How JAX and XLA are set up, in one place; before JAX is first used.

On a CPU, XLA spreads only some operations over its threads. So each core becomes a device of its
own and takes its share of the batch, as on several accelerators (docs/performance.md: 1.2 to 1.3
times faster on two cores). Compiled programs are kept on disk for the next start, and what memory
the compiler has left in the process is given back. No other flag of XLA is set: those that were
tried won nothing.

A user's own settings win: JAX_NUM_CPU_DEVICES or --xla_force_host_platform_device_count in
XLA_FLAGS for the devices, JAX_COMPILATION_CACHE_DIR for the cache.
"""

import contextlib
import ctypes
import math
import os

import jax

CACHE = os.path.join("~", ".cache", "vit_at")
_DEVICE_COUNT_FLAG = "xla_force_host_platform_device_count"
# Fewer images than this on a core, and what splitting costs outweighs what it wins.
_IMAGES_PER_CORE = 8
_COMPILATION = "/jax/core/compile/backend_compile_duration"
_LONG_COMPILATION = 0.5  # seconds: worth a tenth of a second of giving memory back


def set_up(*batch_sizes: int, cache: str = CACHE) -> None:
    """One device per core, where the platform is a CPU, and a compilation cache.

    Args:
      batch_sizes: every one must divide over the devices; so there may be fewer than cores.
      cache: directory of compiled programs; '': none.
    """
    chosen_by_user = (
        _DEVICE_COUNT_FLAG in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    )
    if not chosen_by_user:
        jax.config.update("jax_num_cpu_devices", cpu_devices(_cores(), *batch_sizes))
    use_compilation_cache(cache)
    jax.monitoring.register_event_duration_secs_listener(_trim_after_compilation)


def _trim_after_compilation(event: str, duration: float, **_: object) -> None:
    """Gives freed memory back to the system: else the first step comes on top of the compiler's."""
    if event == _COMPILATION and duration > _LONG_COMPILATION:
        with contextlib.suppress(AttributeError, OSError):  # glibc's alone
            ctypes.CDLL(None).malloc_trim(0)


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in ``directory``; '' or one that the user has set: no change."""
    if directory and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))


def cpu_devices(cores: int, *batch_sizes: int) -> int:
    """The most devices, up to one per core, over which all batches divide in parts worth it.

    Without batch sizes: a power of two, which divides the usual ones.
    """
    if not batch_sizes:
        return 1 << (cores.bit_length() - 1)
    common = math.gcd(*batch_sizes)
    fitting = (n for n in range(1, cores + 1) if common % n == 0 and common >= n * _IMAGES_PER_CORE)
    return max(fitting, default=1)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
