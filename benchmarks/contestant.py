"""One case in a process of its own: imports, compilation, first step, peak memory. Prints JSON.

    python benchmarks/cold.py '{"case": {...}, "subject": "ours", "cache": "", "steps": 2}'

Its last line holds, in seconds since ``start`` (the parent's clock, else this script's start):
``imported``, ``first_step``; ``steps_s``, the duration of each later one; ``peak_rss`` in bytes;
and ``device_peak``, bytes of accelerator memory, or null.
"""

import json
import os
import resource
import sys
import time

START = time.time()


def _ours(request):
    import vit_at.main  # noqa: F401  all that a run imports

    imported = time.time()
    import ours

    from vit_at import runtime

    runtime.set_up(request["case"]["batch"], cache=request.get("cache") or "")
    return imported, ours.contestant, ours.memory_peak


def _theirs(request):
    import theirs
    import torch

    torch.set_num_threads(request.get("threads") or os.cpu_count())

    def make(case):
        return theirs.contestant(case, request["subject"] == "compiled")

    return time.time(), make, theirs.memory_peak


def main() -> None:
    """Runs what the first argument asks for."""
    request = json.loads(sys.argv[1])
    from common import Case  # also puts the repository on the path

    start = request.get("start") or START
    prepare = _ours if request["subject"] == "ours" else _theirs
    imported, make, device_peak = prepare(request)
    contestant = make(Case(**request["case"]))
    contestant.run()
    result = {"imported": imported - start, "first_step": time.time() - start, "steps_s": []}
    for _ in range(request.get("steps", 2)):
        before = time.perf_counter()
        contestant.run()
        result["steps_s"].append(time.perf_counter() - before)
    result["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["device_peak"] = device_peak()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
