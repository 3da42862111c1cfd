"""Reads the text of a compiled program (HLO): its computations, loops, collectives and traffic.

computations, loop_body, reachable   parts of the text
Program                              its instructions, each as often as it runs
collective_bytes                     what the devices exchange
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
NO_KERNEL = {  # what costs nothing itself
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("while", "conditional", "call", "async-start", "partition-id"),
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ARRAY = re.compile(r"\b(pred|[su]\d+|bf16|f\d+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


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


def nbytes(shapes: str) -> int:
    """Bytes of the arrays in a type, such as '(f32[8,2]{1,0}, bf16[3])'."""
    sizes = _ARRAY.findall(shapes)
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in sizes
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; rest: what follows the operands: attributes and metadata."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def scope(self) -> str:
        """The operation of the source that it comes from (``op_name``)."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, *names: str) -> str:
        """The computation that the first of these attributes names; '': none."""
        found = (re.search(rf"\b{name}=%?([\w.\-]+)", self.rest) for name in names)
        return next((match[1] for match in found if match), "")


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that runs: its trips, how often it is entered, and the source that it comes from."""

    trips: int
    entered: int
    scope: str


class Program:
    """The instructions of a program by computation."""

    def __init__(self, text: str):
        found = _COMPUTATION.findall(text)
        (self.entry,) = (name for is_entry, name, _ in found if is_entry)
        self.computations = {
            name: {i.name: i for line in body.splitlines() if (i := _parse(line))}
            for _, name, body in found
        }

    def runs(
        self, name: str = "", times: int = 1, loops: tuple[Loop, ...] = ()
    ) -> Iterator[tuple[str, Instruction, int, tuple[Loop, ...]]]:
        """(computation, instruction, how often it runs, the loops around it) from the entry on.

        Of a conditional, the longest branch runs. Loops themselves are yielded, too.
        """
        for i in self.computations.get(name or self.entry, {}).values():
            yield name or self.entry, i, times, loops
            if i.operation == "while":
                loop = Loop(self.trips(i), times, i.scope)
                body = i.attribute("body")
                yield from self.runs(body, times * loop.trips, (*loops, loop))
            elif i.operation == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
                names += [i.attribute("true_computation"), i.attribute("false_computation")]
                longest = max(names, key=lambda n: len(self.computations.get(n, ())))
                yield from self.runs(longest, times, loops)
            elif i.operation in ("call", "async-start"):
                yield from self.runs(i.attribute("to_apply", "calls"), times, loops)

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler knows, else the constant of its condition."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        return max(self._constants(loop.attribute("condition")), default=1)

    def _constants(self, name: str) -> list[int]:
        found = []
        for i in self.computations.get(name, {}).values():
            if i.operation == "constant" and i.shape.startswith("s32[]"):
                found += [int(n) for n in re.findall(r"^\((-?\d+)\)", i.rest)]
            if inner := i.attribute("calls", "to_apply"):
                found += self._constants(inner)
        return found

    def traffic(self, computation: str, i: Instruction) -> int:
        """Bytes that a kernel reads and writes, with nothing in a cache.

        Where it reads a slice of an operand, or writes into a slice of its result in place, only
        the slice counts.
        """
        here = self.computations[computation]
        if i.operation == "custom-call":  # a library's scratch memory is no result
            i = dataclasses.replace(i, shape=re.sub(r"\b[su]8\[\d+\][^,)]*\)$", ")", i.shape))
        sizes = [nbytes(here[name].shape) if name in here else 0 for name in i.operands]
        if i.operation == "dynamic-update-slice":
            return 2 * sizes[1]
        if i.operation in ("dynamic-slice", "slice", "gather"):
            return 2 * nbytes(i.shape)
        fused = self.computations.get(i.attribute("calls"), {})
        if i.operation != "fusion" or not fused:
            return nbytes(i.shape) + sum(sizes)
        written, in_place = _written(fused)
        for inner in fused.values():
            if inner.operation == "parameter":
                number = int(re.match(r"\((\d+)\)", inner.rest)[1])
                read = 0 if inner.name in in_place else _slices_read(fused, inner.name)
                sizes[number] = min(sizes[number], read) if read is not None else sizes[number]
        return written + sum(sizes)


def _parse(line: str) -> Instruction | None:
    """An instruction; types of tuples hold spaces and '='."""
    name, equals, value = line.strip().partition(" = ")
    if not equals:
        return None
    value = re.sub(r"/\*.*?\*/", "", value)
    end = _closing(value, 0) if value.startswith("(") else value.index(" ")
    found = re.match(r" *([\w\-]+)(?=\()", value[end:])
    if not found:
        return None
    shape, value = value[:end], value[end + found.end() :]
    close = _closing(value, 0)
    operands = tuple(re.findall(r"%([\w.\-]+)", value[:close]))
    is_root, name = name.startswith("ROOT "), name.removeprefix("ROOT ").lstrip("%")
    rest = value if found[1] in ("constant", "parameter") else value[close:]
    return Instruction(name, shape, found[1], operands, rest, is_root)


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    return len(text)


def _slices_read(fused: dict[str, Instruction], name: str) -> int | None:
    """Bytes of the slices of an operand that a fusion reads; None: it reads all of it."""
    total = 0
    for user in fused.values():
        if name not in user.operands:
            continue
        if user.operation == "bitcast":
            read = _slices_read(fused, user.name)
            if read is None:
                return None
            total += read
        elif user.operation in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += nbytes(user.shape)
        else:
            return None
    return total


def _written(fused: dict[str, Instruction]) -> tuple[int, set[str]]:
    """(bytes that a fusion writes, its operands that it updates in place)."""

    def source(name: str) -> Instruction:
        i = fused[name]
        return source(i.operands[0]) if i.operation == "bitcast" else i

    (root,) = (i for i in fused.values() if i.is_root)
    results = [source(n) for n in (root.operands if root.operation == "tuple" else (root.name,))]
    total, in_place = 0, set()
    for result in results:
        if result.operation == "dynamic-update-slice":
            total += nbytes(fused[result.operands[1]].shape)
            in_place.add(source(result.operands[0]).name)
        else:
            total += nbytes(result.shape)
    return total, in_place


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (how often it runs, bytes of the results)} of the collectives of a program."""
    total: dict[str, tuple[int, int]] = {}
    for _, i, times, _ in Program(text).runs():
        kind = i.operation.removesuffix("-start")
        if re.fullmatch(COLLECTIVES, kind):
            count, size = total.get(kind, (0, 0))
            total[kind] = count + times, size + times * nbytes(i.shape)
    return total


def collective_bytes(text: str) -> dict[str, int]:
    """{kind: bytes of the results} of the collectives that a program runs."""
    return {kind: size for kind, (_, size) in collectives(text).items()}
