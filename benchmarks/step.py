"""Our training step beside PyTorch's and the machine's limit, in one run.

    python benchmarks/step.py --models deit_tiny_patch16_224@32/4 --batch 64 \
        --objectives at,trades,pgd --out benchmarks/results/NAME.json

Every contestant does the same case in turn, again and again; medians and quartiles are kept.
PyTorch takes part where torch and timm can be imported. See benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    Case,
    interleaved,
    machine,
    parse_model,
    print_table,
    write_json,
)

HERE = Path(__file__).resolve().parent


def main() -> None:
    """The command line."""
    options = _parse_arguments()
    from vit_at import runtime

    batches = map(int, options.batch.split(","))
    runtime.set_up(*batches)
    missing = _why_no_torch() if "torch" in options.against else "not asked for"
    if missing:
        print(f"PyTorch does not take part: {missing}")
    result: dict[str, Any] = {"machine": machine(), "torch": missing or "takes part"}
    result["cases"] = [_measure(case, options, not missing) for case in _cases(options)]
    if options.cold:
        result["cold"] = _cold(_cases(options)[0], not missing)
    write_json(options.out, result)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH, comma-separated")
    add("--batch", default="64", help="batch sizes, comma-separated")
    add("--objectives", default="at", help="of at, trades, mart, pgd; +masked adds ARD and PRM")
    add("--dtypes", default="float32", help="of our matrix products, comma-separated")
    add("--attack_steps", type=int, default=10)
    add("--pgd_steps", type=int, default=20, help="of the objective pgd")
    add("--keep", type=float, default=0.5, help="keep probability of ARD and PRM, held fixed")
    add("--against", default="torch", help="torch: eager and compiled; eager: only it; none")
    add("--repetitions", type=int, default=9)
    add("--seconds", type=float, default=60.0, help="of repetitions per case, about")
    add("--cold", action="store_true", help="also start, compilation and memory, in own processes")
    add("--out", default="", help="JSON file; '': only the table")
    options = parser.parse_args()
    if options.against == "eager":
        options.against = "torch-eager"
    return options


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for model in options.models.split(","):
        for batch in map(int, options.batch.split(",")):
            for item in options.objectives.split(","):
                objective, _, masked = item.partition("+")
                steps = options.pgd_steps if objective == "pgd" else options.attack_steps
                fields = {"objective": objective, "masked": bool(masked), "steps": steps}
                cases.append(Case(**parse_model(model), batch=batch, keep=options.keep, **fields))
    return cases


def _why_no_torch() -> str:
    """'' where torch and timm can be imported, else why not."""
    try:
        import timm
        import torch

        torch.set_num_threads(os.cpu_count())
        del timm
    except Exception as error:  # a broken installation raises anything
        return f"{type(error).__name__}: {error}"
    return ""


def _measure(case: Case, options: argparse.Namespace, with_torch: bool) -> dict[str, Any]:
    """Times all contestants of a case and prints its table."""
    import limits
    import ours

    contestants, skipped = [], {}
    makers = {f"vit_at {d}": (ours.contestant, _with(case, dtype=d)) for d in _dtypes(options)}
    if with_torch:
        import theirs

        makers["torch eager float32"] = (lambda c: theirs.contestant(c, False), case)
        if options.against == "torch":
            makers["torch compile bfloat16"] = (lambda c: theirs.contestant(c, True), case)
    for name, (make, its_case) in makers.items():
        try:
            contestant = make(its_case)
            contestant.run()
            contestants.append(contestant)
        except Exception as error:  # out of memory, no compiler: said, and the others go on
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times = interleaved(contestants, options.repetitions, options.seconds)

    config = ours.configuration(case)
    flops = limits.case_flops(case, config)
    shapes = limits.model_shapes(case, config)
    rates = {dtype: limits.matmul_rates(dtype, shapes) for dtype in ("float32", "bfloat16")}
    peaks = {dtype: max(of_dtype.values()) for dtype, of_dtype in rates.items()}
    for name, row in times.items():
        row["images_per_second"] = case.batch / row["median_s"]
        row["flops_per_second"] = flops / row["median_s"]
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        row["utilisation"] = row["flops_per_second"] / peaks[dtype]
    _print(case, times, peaks, flops, skipped)
    return {
        "case": dataclasses.asdict(case),
        "title": case.title,
        "flops": flops,
        "matmul_flops_per_second": rates,
        "floor_s": {dtype: flops / peak for dtype, peak in peaks.items()},
        "results": times,
        "skipped": skipped,
    }


def _dtypes(options: argparse.Namespace) -> list[str]:
    return options.dtypes.split(",")


def _with(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


def _print(case, times, peaks, flops, skipped):
    print(f"\n{case.title}: {flops / 1e9:.4g} GFLOP a step; matrix products at best", end=" ")
    print(", ".join(f"{peak / 1e9:.4g} GFLOP/s in {dtype}" for dtype, peak in peaks.items()))
    ours = next(iter(times.values()))["median_s"] if times else None
    rows = []
    for name, row in times.items():
        low, high = row["quartiles_s"]
        rows.append(
            [
                name,
                f"{row['median_s']:.4g} s",
                f"{low:.4g} - {high:.4g}",
                f"{row['images_per_second']:.4g}",
                f"{row['utilisation']:.1%}",
                f"{row['median_s'] / ours:.2f}x",
            ]
        )
    header = ["contestant", "median", "quartiles", "images/s", "of matmul peak", "time / ours"]
    print_table(header, rows)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")


def _cold(case: Case, with_torch: bool) -> dict[str, Any]:
    """Start, compilation and peak memory of each subject, each in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        subjects = {"ours, empty cache": ("ours", cache), "ours, warm cache": ("ours", cache)}
        if with_torch:
            subjects["torch eager"] = ("eager", "")
        found = {name: child(case, *of) for name, of in subjects.items()}
    rows = []
    for name, result in found.items():
        memory = result.get("device_peak") or result.get("peak_rss") or 0
        values = [result.get(k) for k in ("imported", "first_step", "compile_s")]
        seconds = ["-" if v is None else f"{v:.3g} s" for v in values]
        rows.append([name, *seconds, f"{memory / 2**20:.0f} MiB"])
        if "error" in result:
            print(f"{name}: {result['error']}")
    print(f"\n{case.title}, from the start of the process")
    print_table(["process", "imported", "first step done", "compilation", "peak memory"], rows)
    return {"case": dataclasses.asdict(case), "processes": found}


def child(case: Case, subject: str, cache: str = "", env: dict[str, str] | None = None) -> dict:
    """What benchmarks/cold.py says of a case; compile_s: the first step less a later one."""
    request = {"case": dataclasses.asdict(case), "subject": subject, "cache": cache}
    command = [sys.executable, str(HERE / "cold.py")]
    environment = os.environ | (env or {})
    start = time.time()
    ended = subprocess.run(
        [*command, json.dumps(request | {"start": start})],
        capture_output=True,
        text=True,
        env=environment,
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        return {"error": lines[-1][:300]}
    result = json.loads(ended.stdout.splitlines()[-1])
    later = sorted(result["steps_s"])[len(result["steps_s"]) // 2]
    result["compile_s"] = result["first_step"] - result["imported"] - later
    return result


if __name__ == "__main__":
    main()
