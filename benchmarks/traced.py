"""How long each kernel of our training step takes, as the profiler measures it on this machine.

    python benchmarks/traced.py --batch 1024 --out FILE.json

By part of the model, by kind, and the longest kernels, each with the rate at which it moves its
bytes (read off the compiled program as in ``compiled``), beside the time of a step without the
profiler. Command buffers are off on a GPU, as the profiler knows no operation of theirs.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import compiled
import hlo
import jax
import ours

from vit_at.distributed import devices

LONGEST = 20  # kernels that are shown by themselves


@dataclasses.dataclass
class Time:
    """Of some kernels in one step on one device: how many run, their seconds and bytes."""

    kernels: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0

    def add(self, other: "Time") -> None:
        """Adds the kernels of another."""
        self.kernels += other.kernels
        self.seconds += other.seconds
        self.bytes += other.bytes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="deit_tiny_patch16_224@32/4", help="NAME@SIZE/PATCH")
    add("--batch", type=int, default=64)
    add("--dtype", default="bfloat16")
    add("--attack_steps", type=int, default=10)
    add("--depth", type=int, default=0, help="0: that of the architecture")
    add("--steps", type=int, default=5, help="under the profiler, and as many without it")
    add("--out", default="", help="JSON file; '': only the tables")
    options = parser.parse_args()
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_enable_command_buffer="]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))  # read when JAX is first used
    devices.configure(options.batch)
    fields = {"batch": options.batch, "dtype": options.dtype, "depth": options.depth}
    fields["steps"] = options.attack_steps
    case = common.Case(**common.parse_model(options.model), **fields)
    run, program = ours.training(ours.make_setup(case), options.batch)
    run()  # the first step is slower
    seconds = []
    for _ in range(options.steps):
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    kernels = {
        name: Time(count / options.steps, total / options.steps)
        for name, (count, total) in profiled(run, options.steps).items()
    }
    report = {"case": dataclasses.asdict(case), "machine": common.machine()}
    report |= {
        "step_s": statistics.median(seconds),
        **summary(hlo.Program(program.as_text()), kernels),
    }
    _show(case.title, report)
    common.write_json(options.out, report)


def profiled(run: Callable[[], None], steps: int) -> dict[str, tuple[float, float]]:
    """{operation, or kernel where it has none: (times, seconds)} of some steps, of one device."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(steps):
                run()
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        found: dict[str, tuple[float, float]] = {}
        for name, seconds in _events(jax.profiler.ProfileData.from_file(str(path))):
            count, total = found.get(name, (0.0, 0.0))
            found[name] = count + 1 / jax.device_count(), total + seconds / jax.device_count()
    return found


def _events(profile: Any) -> Iterator[tuple[str, float]]:
    """(operation or kernel, seconds) of what ran on the devices."""
    for plane in profile.planes:
        on_gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation or (on_gpu and line.name.startswith("Stream")):
                    yield operation or event.name, event.duration_ns / 1e9


def summary(program: hlo.Program, kernels: dict[str, Time]) -> dict[str, Any]:
    """Totals, and times by part of the model and by kind, as JSON values.

    kernels: {operation: time}; their bytes are filled in. Loops and calls count as their contents.
    """
    known = {i.name: (where, i) for where, i, *_ in program.runs()}
    total, parts, kinds, longest = Time(), {}, {}, {}
    for name, spent in kernels.items():
        part = kind = "no operation of the program"
        if name in known:
            where, i = known[name]
            if i.operation in hlo.NO_KERNEL or i.operation.endswith("-done"):
                continue
            spent.bytes = spent.kernels * program.traffic(where, i)
            part, kind = (
                compiled.part_of(i.scope),
                compiled.kind_of(program, i, compiled.product_of(program, where, i)),
            )
            longest[f"{name}: {i.scope[-70:]}"] = spent
        else:
            longest[name] = spent
        for time_of in (total, parts.setdefault(part, Time()), kinds.setdefault(kind, Time())):
            time_of.add(spent)
    ranked = {
        group: dict(sorted(times.items(), key=lambda item: -item[1].seconds))
        for group, times in {"parts": parts, "kinds": kinds, "longest": longest}.items()
    }
    ranked["longest"] = dict(list(ranked["longest"].items())[:LONGEST])
    return dataclasses.asdict(total) | {
        group: {name: dataclasses.asdict(spent) for name, spent in times.items()}
        for group, times in ranked.items()
    }


def _show(title: str, report: dict[str, Any]) -> None:
    step, busy = report["step_s"], report["seconds"]
    print(f"\n{title}: {step * 1e3:.4g} ms a step, of which kernels run {busy * 1e3:.4g} ms")
    for group in ("parts", "kinds", "longest"):
        rows = []
        for name, spent in report[group].items():
            rate = spent["bytes"] / spent["seconds"] / 1e9 if spent["seconds"] else 0.0
            row = [name, f"{spent['kernels']:.4g}", f"{spent['seconds'] * 1e3:.4g}"]
            rows.append([*row, f"{spent['seconds'] / busy:.1%}", f"{rate:.4g}"])
        common.print_table([group, "kernels", "ms", "share", "GB/s"], rows)


if __name__ == "__main__":
    main()
