"""One way to run a case, in a process of its own, so that no contestant disturbs another.

In one process they would share an allocator, thread pools and the memory that is measured.

Contestant    starts the process, asks it for one run after the other, and ends it
the script    is that process: it does a case each time a line comes in, and answers in JSON
"""

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# This process and its contestants share an accelerator: none may take its memory in advance.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Contestant:
    """A case, run by 'ours', or by PyTorch: 'eager', 'compiled' or 'graphs' (see ``theirs``).

    cache: directory of our compiled programs; '': none. env: added to the environment.

    Raises, here and in all methods:
      RuntimeError: the process ended; its last words.
    """

    def __init__(self, case: Any, subject: str, cache: str = "", env: dict[str, str] | None = None):
        request = {"case": dataclasses.asdict(case), "subject": subject, "cache": cache}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the process keeps it
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(request | {"start": time.time()})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | (env or {}),
        )
        # Seconds since the start: when all was imported, and when the first run was done.
        self.imported, self.first_run = self._answer()

    def run(self) -> float:
        """Does the case once more; returns its duration in seconds."""
        return self._ask("run")

    def end(self) -> int:
        """Ends the process; returns its peak memory in bytes, of its accelerator if it has one."""
        peak = self._ask("end")
        self._process.wait()
        return peak

    def _ask(self, word: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says why
            print(word, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        raise RuntimeError(lines[-1][:300])


def main() -> None:
    """Runs the case of the first argument, a JSON object, as often as lines ask for it."""
    request = json.loads(sys.argv[1])
    from common import Case

    case = Case(**request["case"])
    prepare = _ours if request["subject"] == "ours" else _theirs
    imported, run, accelerator_peak = prepare(case, request)
    run()
    _say([imported - request["start"], time.time() - request["start"]])
    for line in sys.stdin:
        if line.strip() == "end":
            _say(accelerator_peak() or _peak_resident())
            return
        before = time.perf_counter()
        run()
        _say(time.perf_counter() - before)


def _peak_resident() -> int:
    """Bytes of main memory at most in use by this program.

    (Linux counts the parent's memory at the fork in getrusage's figure.)
    """
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _say(value: Any) -> None:
    print(f"answer {json.dumps(value)}", flush=True)


Prepared = tuple[float, Callable[[], None], Callable[[], int | None]]


def _ours(case: Any, request: dict[str, Any]) -> Prepared:
    import vit_at.main  # noqa: F401  all that a run imports

    imported = time.time()
    import jax
    import ours

    if case.dtype == "float32" and not case.tf32:  # TF32 is JAX's own choice on a GPU
        jax.config.update("jax_default_matmul_precision", "highest")

    from vit_at.distributed import devices

    devices.configure(case.batch, cache=request["cache"])
    return imported, ours.runner(case), ours.memory_peak


def _theirs(case: Any, request: dict[str, Any]) -> Prepared:
    import theirs
    import torch

    torch.set_num_threads(os.cpu_count())
    imported = time.time()
    return imported, theirs.runner(case, request["subject"]), theirs.memory_peak


if __name__ == "__main__":
    main()
