"""Reads the text of a compiled program (HLO): its computations, loops and collectives."""

import collections
import functools
import math
import re

COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_SENT = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")
_ARRAY = re.compile(r"(f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]")
_SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def computations(text: str) -> dict[str, str]:
    """{name: text} of a program's computations."""
    return {name: body for _, name, body in _COMPUTATION.findall(text)}


def loop_body(text: str, scope: str) -> str:
    """The name of the body of the one loop whose op_name ends in ``scope``."""
    (body,) = re.findall(
        rf'while\([^\n]*body=%?([\w.\-]+)[^\n]*op_name="[^"]*{re.escape(scope)}"', text
    )
    return body


def reachable(text: str, name: str) -> str:
    """The text of a computation and of every computation that it calls."""
    texts, seen, todo = computations(text), set(), [name]
    while todo:
        here = todo.pop()
        if here in seen or here not in texts:
            continue
        seen.add(here)
        todo += re.findall(r"%([\w.\-]+)", texts[here])
    return "\n".join(texts[name] for name in seen)


def collective_bytes(text: str) -> dict[str, int]:
    """{kind: bytes of the results} of the collectives that a program runs.

    A collective in a loop counts as often as the loop is known to run.
    """
    texts = computations(text)
    (entry,) = (name for is_entry, name, _ in _COMPUTATION.findall(text) if is_entry)

    @functools.cache
    def of_computation(name: str) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for line in texts.get(name, "").splitlines():
            if found := _SENT.search(line):
                total[found[2]] += _nbytes(found[1])
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                for kind, size in of_computation(called).items():
                    total[kind] += size * (int(trips[1]) if trips else 1)
        return total

    return dict(of_computation(entry))


def _nbytes(shapes: str) -> int:
    return sum(
        _SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(shapes)
    )
