"""Our step or evaluation in variants: attention by a kernel or not, options of XLA.

    python benchmarks/variants.py attention --batch 1024 --out FILE
    python benchmarks/variants.py flags --batch 1024 --out FILE
    python benchmarks/variants.py flags --objective pgd --batch 512 --out FILE

attention   by one kernel, as a run in bfloat16 on a GPU or TPU, or by the formula
flags       command buffers (CUDA graphs), tuning, products by Triton, the order of kernels

Each variant is a process of its own, and they take turns. A variant that fails is said, as XLA's
options come and go with its versions.
"""

import argparse
import dataclasses
import os
from typing import Any

from common import Case, interleaved, machine, mebibytes, parse_model, print_table, write_json
from contestant import Contestant

_GRAPHS, _ALL = "--xla_gpu_enable_command_buffer=", "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL"
FLAGS = {  # {variant: what is added to XLA_FLAGS}
    "as in a run": "",
    "no command buffers": _GRAPHS,
    "command buffers of single kernels": f"{_GRAPHS}{_ALL} --xla_gpu_graph_min_graph_size=1",
    "command buffers of loops": f"{_GRAPHS}{_ALL},WHILE,CONDITIONAL",
    "no tuning": "--xla_gpu_autotune_level=0",
    "no products by Triton": "--xla_gpu_enable_triton_gemm=false",
    "latency-hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("kind", choices=("attention", "flags"))
    add("--models", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH, comma-separated")
    add("--objective", default="at", help="at, trades, mart, or pgd: an evaluation, in float32")
    add("--batch", type=int, default=64)
    add("--dtype", default="bfloat16")
    add("--attack_steps", type=int, default=10)
    add("--depth", type=int, default=0, help="0: that of the architecture")
    add("--repetitions", type=int, default=9)
    add("--seconds", type=float, default=30.0, help="of repetitions per model, about")
    add("--out", default="", help="JSON file; '': only the tables")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "kind": options.kind, "cases": []}
    for model in options.models.split(","):
        fields = {"batch": options.batch, "dtype": options.dtype, "depth": options.depth}
        fields |= {"objective": options.objective, "steps": options.attack_steps}
        result["cases"].append(_measure(Case(**parse_model(model), **fields), options))
        write_json(options.out, result)


def variants(kind: str, case: Case) -> dict[str, tuple[Case, dict[str, str]]]:
    """{name: (case, environment)}; the first is what a run does."""
    if kind == "attention":
        plain = dataclasses.replace(case, plain_attention=True)
        return {"as in a run": (case, {}), "plain formula": (plain, {})}
    given = os.environ.get("XLA_FLAGS", "")
    return {
        name: (case, {"XLA_FLAGS": f"{given} {added}".strip()}) for name, added in FLAGS.items()
    }


def _measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    contestants, skipped = {}, {}
    for name, (variant, env) in variants(options.kind, case).items():
        try:
            contestants[name] = Contestant(variant, "ours", env=env)
        except RuntimeError as error:  # such as an option that this XLA does not have
            skipped[name] = str(error)
    runs = {name: contestant.run for name, contestant in contestants.items()}
    results, rows = interleaved(runs, options.repetitions, options.seconds), []
    for name, contestant in contestants.items():
        found = results[name]
        found |= {"first_step": contestant.first_run, "peak_memory": contestant.end()}
        relative = found["median_s"] / next(iter(results.values()))["median_s"]
        seconds = [f"{found['median_s']:.4g} s", f"{relative:.3f}", f"{found['first_step']:.3g} s"]
        rows.append([name, *seconds, mebibytes(found["peak_memory"])])
    print(f"\n{case.title} in {case.dtype}")
    print_table(["variant", "step", "time / first", "first step done", "peak memory"], rows)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")
    return {"case": dataclasses.asdict(case), "results": results, "skipped": skipped}


if __name__ == "__main__":
    main()
