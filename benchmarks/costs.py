"""What each method beyond the paper costs: a training step with it over one without, and on paper.

    python benchmarks/costs.py [--model deit_tiny_patch16_224@32/4] [--depth 4] [--out FILE]

AT with two steps of PGD in float32 is the step without. All steps take turns in one process.
"""

import argparse
import time
from typing import Any

import ours
from common import Case, interleaved, machine, parse_model, print_table, write_json
from tables import TABLES

from vit_at.training import metrics

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "FGSM with random start": {"threat.steps": 1},
    "N-FGSM": {"threat.steps": 1, "threat.start": "noise"},
    "APGD-2": {"threat.method": "apgd", "threat.start": "zero"},
    "Linf and L2: the worst": {"threat.also": "l2:0.5:0.125"},
    "Linf and L2: the mean": {"threat.also": "l2:0.5:0.125", "threat.combine": "avg"},
    "AWP": {"awp.gamma": 0.005},
    "EMA": {"ema_decay": 0.998},
    "SWA": {"swa_epochs": 1.0},
    "convolutions before the blocks": {"model.stem": "conv"},
    "Muon": {"optimizer.name": "muon"},
    "layer-wise rates": {"optimizer.layer_decay": 0.75},
    "RandAugment": {"data.augment": "randaugment"},
    "random erasing": {"data.augment": "random-erasing"},
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    chosen = options.methods.split(",")
    if unknown := [name for name in chosen if name not in METHODS]:
        parser.error(f"--methods has '{unknown[0]}'; known are {', '.join(METHODS)}")
    names = ["none", *(name for name in chosen if name != "none")]
    sizes = {"batch": options.batch, "depth": options.depth, "steps": 2}
    case = Case(**parse_model(options.model), **sizes)
    runs, passes, operations = {}, {}, {}
    for name in names:
        setup = ours.make_setup(case, METHODS[name])
        run, _ = ours.training(setup, case.batch)
        run()
        runs[name] = _timed(run)
        passes[name] = metrics.step_flops(setup.config, 1.0) / case.batch
        operations[name] = metrics.step_flops(setup.config, setup.model.forward_flops())
    found = interleaved(runs, options.repetitions, 600)
    result = {"case": case.title, "machine": machine(), "methods": {}}
    for name in names:
        ratio = found[name]["median_s"] / found["none"]["median_s"]
        paper = operations[name] / operations["none"]
        costs = {"passes": passes[name], "paper": paper, "ratio": ratio}
        result["methods"][name] = found[name] | costs
    header, *rows = TABLES["costs"](result)
    print_table(header, rows)
    write_json(options.out, result)


def _timed(run: Any) -> Any:
    def timed() -> float:
        before = time.perf_counter()
        run()
        return time.perf_counter() - before

    return timed


if __name__ == "__main__":
    main()
