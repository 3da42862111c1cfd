"""Our training step beside PyTorch's and the machine's limit, in one run.

    python benchmarks/step.py --models deit_tiny_patch16_224@32/4 --batch 64 \
        --objectives at,trades,pgd --out benchmarks/results/NAME.json

Every contestant, a process of its own, does the same case in turn, again and again; medians and
quartiles are kept. On a GPU they compile at the same time. PyTorch takes part where torch and timm
can be imported. See benchmarks/README.md.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import tempfile
from typing import Any

from common import Case, interleaved, machine, mebibytes, parse_model, print_table, write_json
from contestant import Contestant

PYTORCH = {
    "eager": "torch eager float32",
    "compiled": "torch compile bfloat16",
    "graphs": "torch compile bfloat16, CUDA graphs",
}


def main() -> None:
    """The command line."""
    options = _parse_arguments()
    from vit_at.distributed import devices

    devices.configure(*map(int, options.batch.split(",")))
    missing = _why_no_torch() if options.against else "not asked for"
    if missing:
        print(f"PyTorch does not take part: {missing}")
    result: dict[str, Any] = {"machine": machine(), "torch": missing or "takes part"}
    result["cases"] = []
    for case in _cases(options):
        if not missing:
            architecture = Case(case.model, case.image_size, case.patch_size, depth=case.depth)
            result["largest_difference_of_logits"] = _check_same_function(architecture)
        result["cases"].append(_measure(case, options, not missing))
        write_json(options.out, result)  # a later case may take too long
    if options.cold:
        result["cold"] = _cold(_cases(options)[0], not missing)
    write_json(options.out, result)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH, comma-separated")
    add("--batch", default="64", help="batch sizes, comma-separated")
    add("--objectives", default="at", help="of at, trades, mart, pgd; +masked adds ARD and PRM")
    add("--dtypes", default="float32", help="of our products in training, comma-separated")
    add("--tf32", action="store_true", help="float32 products on a GPU in TF32, ours and theirs")
    add("--attack_steps", type=int, default=10)
    add("--depth", type=int, default=0, help="0: that of the architecture")
    add("--pgd_steps", type=int, default=20, help="of the objective pgd")
    add("--keep", type=float, default=0.5, help="keep probability of ARD and PRM, held fixed")
    add("--against", default="eager,compiled,graphs", help="PyTorch's ways; '': ours alone")
    add("--repetitions", type=int, default=9)
    add("--seconds", type=float, default=60.0, help="of repetitions per case, about")
    add("--cold", action="store_true", help="also start, compilation and memory, in own processes")
    add("--out", default="", help="JSON file; '': only the table")
    options = parser.parse_args()
    unknown = set(filter(None, options.against.split(","))) - set(PYTORCH)
    if unknown:
        parser.error(f"--against is '{options.against}'; choose of {', '.join(PYTORCH)}, or ''")
    return options


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for model in options.models.split(","):
        for batch in map(int, options.batch.split(",")):
            for item in options.objectives.split(","):
                objective, _, masked = item.partition("+")
                steps = options.pgd_steps if objective == "pgd" else options.attack_steps
                fields = {"objective": objective, "masked": bool(masked), "steps": steps}
                fields |= {"keep": options.keep, "tf32": options.tf32, "depth": options.depth}
                cases.append(Case(**parse_model(model), batch=batch, **fields))
    return cases


def _why_no_torch() -> str:
    """'' where torch and timm can be imported, else why not."""
    try:
        importlib.import_module("timm")
    except Exception as error:  # a broken installation raises anything
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def _check_same_function(case: Case) -> float:
    """The largest difference between timm's logits and ours on our weights; RuntimeError: large."""
    import jax
    import numpy as np
    import ours
    import theirs

    from vit_at import models, weights

    config = ours.configuration(case)
    model = models.build(config, ours.CLASSES, "float32")
    params = models.init_params(model, jax.random.key(0))
    images = np.random.default_rng(0).random((2, case.image_size, case.image_size, 3), np.float32)
    apply = models.classifier(model, theirs.MEAN, theirs.STD)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(apply)(params, images))
    state = weights.to_timm(params, model, names="1.x")
    difference = float(np.abs(logits - theirs.logits_with(case, state, images)).max())
    if difference > 1e-3:
        raise RuntimeError(f"{case.title}: timm's logits differ from ours by {difference:.2g}")
    return difference


def _measure(case: Case, options: argparse.Namespace, with_torch: bool) -> dict[str, Any]:
    """Times all contestants of a case and prints its table."""
    import jax
    import limits
    import ours

    dtypes = options.dtypes.split(",")
    if case.objective == "pgd":  # we evaluate in float32 only
        dtypes = ["float32"]
    entrants = {f"vit_at {d}": (_with(case, dtype=d), "ours") for d in dtypes}
    on_gpu = jax.default_backend() == "gpu"
    for way, name in PYTORCH.items():
        if with_torch and way in options.against.split(",") and (way != "graphs" or on_gpu):
            entrants[name] = case, way
    contestants, skipped = _start_all(entrants, at_once=on_gpu)
    runs = {name: contestant.run for name, contestant in contestants.items()}
    times = interleaved(runs, options.repetitions, options.seconds)
    for name, contestant in contestants.items():
        times[name]["peak_memory"] = contestant.end()

    config = ours.configuration(case)
    flops = limits.case_flops(case, config)
    shapes = limits.model_shapes(case, config)
    with jax.default_matmul_precision("default" if case.tf32 else "highest"):
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


def _start_all(entrants: dict[str, tuple[Case, str]], at_once: bool) -> tuple[dict, dict]:
    """({name: contestant}, {name: why it can't run}), in the order given.

    at_once: they compile beside each other; on a CPU each needs all cores for that.
    """
    contestants, skipped = {}, {}
    with concurrent.futures.ThreadPoolExecutor(len(entrants) if at_once else 1) as pool:
        started = {name: pool.submit(Contestant, *entrant) for name, entrant in entrants.items()}
        for name, future in started.items():
            try:
                contestants[name] = future.result()
            except RuntimeError as error:  # out of memory, no compiler: said, the others go on
                skipped[name] = str(error)
    return contestants, skipped


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
                mebibytes(row["peak_memory"]),
            ]
        )
    header = ["contestant", "median", "quartiles", "images/s", "of matmul peak", "time / ours"]
    header.append("peak memory")
    print_table(header, rows)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")


def _cold(case: Case, with_torch: bool) -> dict[str, Any]:
    """From the start of a process to the end of its first step, and its peak memory."""
    with tempfile.TemporaryDirectory() as cache:
        subjects = {"ours, empty cache": ("ours", cache), "ours, warm cache": ("ours", cache)}
        if with_torch:
            subjects["torch eager"] = ("eager", "")
        found = {name: _start(case, *subject) for name, subject in subjects.items()}
    rows = []
    for name, result in found.items():
        seconds = [f"{result[k]:.3g} s" for k in ("imported", "first_step", "compile_s")]
        rows.append([name, *seconds, mebibytes(result["peak_memory"])])
    print(f"\n{case.title}, from the start of the process")
    print_table(["process", "imported", "first step done", "compilation", "peak memory"], rows)
    return {"case": dataclasses.asdict(case), "processes": found}


def _start(case: Case, subject: str, cache: str) -> dict[str, float]:
    """Seconds and bytes; compile_s: the first step less a later one."""
    contestant = Contestant(case, subject, cache)
    later = min(contestant.run() for _ in range(2))
    return {
        "imported": contestant.imported,
        "first_step": contestant.first_run,
        "compile_s": contestant.first_run - contestant.imported - later,
        "peak_memory": contestant.end(),
    }


if __name__ == "__main__":
    main()
