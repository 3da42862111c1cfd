"""How the training step scales: virtual CPU devices, batch size, tokens, depth.

    python benchmarks/scaling.py [--model deit_tiny_patch16_224@32/4] [--out FILE]

Each point runs in its own process. With d virtual devices on c cores, the work per core is constant
once d >= c, so the time lost there is the cost of splitting. Accelerators skip this part, as a
process cannot have more devices than there are.
"""

import argparse
import dataclasses
import os
import statistics
from typing import Any

from common import Case, machine, mebibytes, parse_model, print_table, write_json
from contestant import Contestant

RUNS = 3  # of each point, after the first


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attack_steps", type=int, default=10)
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--batches", default="8,16,32,64,128")
    parser.add_argument("--patches", default="8,4,2", help="fewer pixels a patch, more tokens")
    parser.add_argument("--depths", default="3,6,12,24")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    about = machine()
    on_cpu = about["platform"] == "cpu"
    base = Case(
        **parse_model(options.model),
        batch=options.batch,
        dtype=options.dtype,
        steps=options.attack_steps,
    )
    points = _points(base, options, on_cpu)
    result: dict[str, Any] = {"machine": about, "case": dataclasses.asdict(base), "points": []}
    rows = []
    for kind, value, case, env in points:
        point: dict[str, Any] = {"kind": kind, "value": value}
        try:
            contestant = Contestant(case, "ours", env=env)
            seconds = statistics.median(contestant.run() for _ in range(RUNS))
            point |= {"seconds": seconds, "images_per_second": case.batch / seconds}
            point["peak_memory"] = contestant.end()
            rate, memory = point["images_per_second"], mebibytes(point["peak_memory"])
            shown = [f"{seconds:.4g} s", f"{rate:.4g}", memory]
        except RuntimeError as error:  # such as too large; measure the other points
            point["error"] = str(error)
            shown = [point["error"][:60], "-", "-"]
        result["points"].append(point)
        rows.append([kind, str(value), *shown])
    print(base.title)
    print_table(["what varies", "value", "step", "images/s", "peak memory"], rows)
    write_json(options.out, result)


def _points(base: Case, options: argparse.Namespace, on_cpu: bool) -> list[tuple]:
    """(kind, value, case, environment) of each process."""

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    def changed(**changes: Any) -> Case:
        return dataclasses.replace(base, **changes)

    points = []
    if on_cpu:
        flags = os.environ.get("XLA_FLAGS", "")
        for count in numbers(options.devices):
            env = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}"}
            points.append(("devices", count, base, env))
    points += [("batch", n, changed(batch=n), None) for n in numbers(options.batches)]
    for patch in numbers(options.patches):
        tokens = (base.image_size // patch) ** 2 + 1
        points.append(("tokens", tokens, changed(patch_size=patch), None))
    points += [("depth", n, changed(depth=n), None) for n in numbers(options.depths)]
    return points


if __name__ == "__main__":
    main()
