"""Compiles a program for a TPU slice or GPUs that are not there, and reads what it would do.

    python benchmarks/compiled.py --target=tpu:v5e:2x2 --batch_per_device=256
    python benchmarks/compiled.py --target=cuda:h200 --recipe=cifar10_trades:scratch \
        --model=vit_base_patch16_224@224/16 --batch_per_device=128 --program=step --out=FILE.json

Needs the extra ``[tpu]`` or ``[cuda12]``, and no such device. Every time is an estimate: on a TPU
the compiler's own, and of our own kernels those of ``schedule.py``; on a GPU the larger of bytes /
bandwidth and operations / peak of each kernel. Estimates rank variants of a program; they replace
no measurement. See benchmarks/README.md.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import hlo
import schedule
from common import CLASSES, parse_model, print_table, write_json
from targets import CHIPS, Chip, Target

PROGRAMS = ("step", "evaluate", "autoattack")
_FLOAT32_PEAK = 50e12  # of a GPU, without TF32
PARTS = {  # of the model, by the names of its modules; the first that matches counts
    "attention": r"/attn\b",
    "MLP": r"/mlp\b",
    "norms": r"/norm\d?\b",
    "data": r"/inputs\b",
    "update": r"/update\b",
}


def main() -> None:
    """The command line."""
    options, overrides = _parse_arguments()
    devices = options.target.devices()
    import lowered

    from vit_at.distributed import sharding
    from vit_at.errors import one_sentence_errors

    with one_sentence_errors():
        setup = lowered.make_setup(options, overrides, sharding.make_mesh(devices))
    before = time.perf_counter()
    program = getattr(lowered, options.program)(setup, options)
    traced = time.perf_counter()
    compiled = program.compile()
    seconds = {"trace_s": traced - before, "compile_s": time.perf_counter() - traced}
    text = compiled.as_text()
    if options.hlo:
        pathlib.Path(options.hlo).write_text(text)
    report = {"title": lowered.title(setup, options), "target": options.target._asdict()} | seconds
    report |= {"needed_flop": lowered.needed_flop(setup, options)}
    chip = CHIPS[options.target.chip]
    report |= {"kernel_s": _kernel_seconds(text, str(options.target), setup.model)}
    report |= {"memory": memory(compiled), **summary(text, chip, report["kernel_s"])}
    report["share_of_peak"] = _share_of_peak(report, chip)
    show(report)
    write_json(options.out, report)


def _parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--target", default="tpu:v5e:2x2", help="tpu:CHIP:AxB or cuda:CHIP:DEVICES")
    add(
        "--recipe",
        default="cifar10_sgd:scratch,model=deit_tiny_patch16_224",
        help="and --config.FIELD=VALUE, as vit-at train",
    )
    add("--model", default="", help="NAME@SIZE/PATCH; '': the recipe's")
    add("--depth", type=int, default=0, help="number of blocks; 0: the recipe's")
    add("--batch_per_device", type=int, default=256)
    add("--classes", type=int, default=CLASSES)
    add("--program", default="step", choices=PROGRAMS)
    add("--attack", default="", help="of evaluate (pgd-20) or autoattack (apgd-ce)")
    add("--hlo", default="", help="file for the program's text")
    add("--out", default="", help="JSON file; '': only the tables")
    options, overrides = parser.parse_known_args()
    unknown = [word for word in overrides if not word.startswith("--config.")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    try:
        options.target = Target.of(options.target)
        options.target.check_installed()
        options.shape = parse_model(options.model) if options.model else {}
    except ValueError as error:
        parser.error(str(error))
    return options, overrides


def memory(compiled: Any) -> dict[str, int]:
    """Bytes a device."""
    analysis = compiled.memory_analysis()
    names = {"arguments": "argument", "temporaries": "temp", "outputs": "output"}
    names = {name: f"{word}_size_in_bytes" for name, word in names.items()}
    return {name: getattr(analysis, attribute) for name, attribute in names.items()}


@dataclasses.dataclass
class Cost:
    """Of some kernels: how many run, their bytes, and the estimated seconds."""

    kernels: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, times: int, size: int, seconds: float) -> None:
        """Adds a kernel that runs some times."""
        self.kernels += times
        self.bytes += times * size
        self.seconds += times * seconds


def _kernel_seconds(text: str, target: str, model: Any) -> dict[str, float]:
    """{kernel: seconds of a call} of our kernels in a program for a TPU."""
    shapes = set(re.findall(r"%attention_forward[\w.]* = bf16\[(\d+),(\d+),(\d+)\]", text))
    if not shapes:
        return {}
    (shape,) = shapes
    return schedule.seconds(target, *map(int, shape), model.num_heads)


def summary(text: str, chip: Chip, kernels: dict[str, float] | None = None) -> dict[str, Any]:
    """What a program's text says, as JSON values: totals, and costs by kind, part and loop.

    kernels: {name: seconds of a call} of those that XLA estimates nothing of.
    """
    program = hlo.Program(text)
    total, kinds, parts, loops = Cost(), {}, {}, {}
    products: Counter[str] = Counter()
    in_loops = 0  # collectives, each as often as it runs
    for where, i, times, around in program.runs():
        in_loops += times * bool(around and re.match(hlo.COLLECTIVES, i.operation))
        if i.operation in hlo.NO_KERNEL or i.operation.endswith("-done"):
            continue
        product = product_of(program, where, i)
        size = program.traffic(where, i)
        seconds = (kernels or {}).get(i.name.split(".")[0], _seconds(i, product, size, chip))
        if seconds is None:
            continue
        if product:
            products[product.text] += times
        kind = kind_of(program, i, product)
        loop = [f"{loop.trips} trips: {loop.scope[-60:]}" for loop in around]
        groups = [(kinds, kind), (parts, part_of(i.scope)), *((loops, name) for name in loop)]
        total.add(times, size, seconds)
        for group, name in groups:
            group.setdefault(name, Cost()).add(times, size, seconds)
    costs = {"kinds": kinds, "parts": parts, "loops": loops}
    ranked = {
        group: dict(sorted(found.items(), key=lambda item: -item[1].seconds))
        for group, found in costs.items()
    }
    return {
        "kernels": total.kernels,
        "bytes": total.bytes,
        "estimated_s": total.seconds,
        "bytes_over_bandwidth_s": total.bytes / chip.bandwidth,
        "products": dict(products.most_common()),
        "collectives": {name: list(both) for name, both in hlo.collectives(text).items()},
        "collectives_in_loops": in_loops,
        "loop_trips": sorted({loop.trips for *_, around in program.runs() for loop in around}),
    } | {g: {n: dataclasses.asdict(c) for n, c in f.items()} for g, f in ranked.items()}


def part_of(scope: str) -> str:
    """The part of the model or of the step that an operation belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, scope)), "other")


class Product(NamedTuple):
    """A matrix product. text: 'bf16 [8,4] x [4,2]'; flop: 0 where the text does not say."""

    dtype: str
    text: str
    flop: float


def product_of(program: hlo.Program, where: str, i: hlo.Instruction) -> Product | None:
    """The (first) product of a kernel, None if it has none."""
    inside = program.computations.get(i.attribute("calls"), {}) if i.operation == "fusion" else {}
    for body in (inside, {i.name: i}):
        for inner in body.values():
            is_call = inner.operation == "custom-call" and re.search(
                r"target=\"__cu\w+\$(lt\$matmul|gemm|conv)", inner.rest
            )
            if is_call or inner.operation in ("dot", "convolution"):
                names = body if inside else program.computations[where]
                return _describe(inner, names)
    return None


def _describe(i: hlo.Instruction, names: dict[str, hlo.Instruction]) -> Product:
    shapes = [names[n].shape if n in names else "" for n in i.operands[:2]]
    arrays = [re.search(r"(\w+)\[([\d,]*)\]", shape) for shape in shapes]
    text = " x ".join(f"[{a[2]}]" if a else "?" for a in arrays)
    dtype = max((a[1] for a in arrays if a), key=lambda t: hlo.nbytes(f"{t}[]"), default="?")
    axis = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]"?(\d+)', i.rest)
    if not (arrays[0] and axis):
        return Product(dtype, f"{dtype} {text}", 0.0)
    depth = int(arrays[0][2].split(",")[int(axis[1])])
    result = re.search(r"\[([\d,]*)\]", i.shape)[1]
    flop = (
        2.0 * depth * functools.reduce(lambda a, b: a * int(b), filter(None, result.split(",")), 1)
    )
    return Product(dtype, f"{dtype} {text}", flop)


def _seconds(i: hlo.Instruction, product: Product | None, size: int, chip: Chip) -> float | None:
    """An estimate; None for what costs nothing."""
    if chip.platform == "tpu":
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
        return int(cycles[1]) / chip.clock if cycles else None
    rate = chip.peak if product and product.dtype in ("bf16", "f16") else _FLOAT32_PEAK
    return max(size / chip.bandwidth, product.flop / rate if product else 0.0)


def kind_of(program: hlo.Program, i: hlo.Instruction, product: Product | None) -> str:
    """'product DTYPE', 'copy', 'fusion', or 'stack': a fusion that copies a slice of a stack."""
    if product:
        return f"product {product.dtype}"
    inside = program.computations.get(i.attribute("calls"), {})
    slices = ("dynamic-slice", "dynamic-update-slice")
    if i.operation in slices or any(x.operation in slices for x in inside.values()):
        return "stack"
    return i.operation


def _share_of_peak(report: dict[str, Any], chip: Chip) -> float:
    return report["needed_flop"] / chip.peak / report["estimated_s"]


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    sizes = ", ".join(f"{n} {b / 2**30:.2f} GiB" for n, b in report["memory"].items())
    print(f"{report['title']} for {':'.join(report['target'].values())}")
    print(f"traced in {report['trace_s']:.0f} s, compiled in {report['compile_s']:.0f} s")
    print(f"memory a device: {sizes}")
    print(
        f"{report['kernels']} kernels, {report['bytes'] / 1e9:.1f} GB "
        f"({report['bytes_over_bandwidth_s'] * 1e3:.4g} ms at the bandwidth), estimated "
        f"{report['estimated_s'] * 1e3:.4g} ms, {report['share_of_peak']:.1%} of the bf16 peak"
    )
    for kind, (count, size) in report["collectives"].items():
        print(f"{kind}: {count} times, {size / 2**20:.3g} MiB")
    for group in ("kinds", "parts", "loops"):
        rows = [
            [name, str(c["kernels"]), f"{c['bytes'] / 1e9:.4g}", f"{c['seconds'] * 1e3:.4g}",
             f"{c['seconds'] / report['estimated_s']:.1%}"]
            for name, c in list(report[group].items())[:10]
        ]  # fmt: skip
        print_table([group, "kernels", "GB", "estimated ms", "share"], rows)
    rows = [[name, str(count)] for name, count in list(report["products"].items())[:12]]
    print_table(["products", "times"], rows)


if __name__ == "__main__":
    sys.exit(main())
