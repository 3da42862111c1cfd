#!/usr/bin/env python3
"""Draws how the packages of vit_at import each other: layout.svg, the table of architecture.md.

    python docs/layout.py

Imports are read from the source by ast; nothing is imported. tests/test_layout.py checks the order
of the packages with the same reader, and that the picture and the table are up to date.
"""

import ast
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vit_at"
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "layout.svg"
BEGIN, END = "<!-- written by docs/layout.py -->\n", "<!-- end -->\n"

# From the top down. A name is a package of vit_at, or one of LIBRARY_FILES; all other files
# directly in vit_at/ are commands.
ORDER = [
    "errors",
    "config",
    "schema",
    "console",
    "distributed",
    "data",
    "models",
    "weights",
    "workdir",
    "attacks",
    "attacks.autoattack",
    "evaluation",
    "training",
    "reporting",
    "commands",
]
LIBRARY_FILES = {"errors", "schema", "console"}


# --- Reading ----------------------------------------------------------------------------------


def name_of(path: pathlib.Path) -> str:
    """The module of a file, such as 'training.step', without 'vit_at.'."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    package = module.rpartition(".")[0]
    return package or (module if module in LIBRARY_FILES else "commands")


def imported(path: pathlib.Path) -> set[str]:
    """The package's modules that a file imports, at any level of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        found |= {name.removeprefix("vit_at.") for name in names if name.startswith("vit_at.")}
    modules = {name for name in found if (PACKAGE / f"{name.replace('.', '/')}.py").exists()}
    packages = {n for n in found if (PACKAGE / n.replace(".", "/") / "__init__.py").exists()}
    return modules | {f"{name}.__init__" for name in packages}


FILES = {
    name_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "packaged" not in path.parts  # data, such as the loader of exports
}
IMPORTS = {name: imported(path) - {name} for name, path in FILES.items()}


def modules_of(room: str) -> list[str]:
    """The modules of a room, without __init__ and __main__."""
    return [name for name in FILES if room_of(name) == room and not name.endswith("__")]


def room_imports() -> dict[str, list[str]]:
    """{room: the other rooms that it imports from}, both in ORDER."""
    found: dict[str, set[str]] = {room: set() for room in ORDER}
    for name, others in IMPORTS.items():
        found[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    return {room: [other for other in ORDER if other in found[room]] for room in ORDER}


# --- Table ------------------------------------------------------------------------------------


def purpose(room: str) -> str:
    """The first line of a room's docstring; of the commands, their names."""
    if room == "commands":
        return "One file each: " + ", ".join(f"`{name}`" for name in modules_of(room))
    path = FILES.get(room) or FILES[f"{room}.__init__"]
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].rstrip(".")


def path_of(room: str) -> str:
    """How a room is written in the table and the picture."""
    return f"{room}.py" if room in LIBRARY_FILES else room.replace(".", "/")


def table() -> str:
    """The table in Markdown. Lines are rounded to hundreds, so that few edits make it stale."""
    rows = ["| room | what it holds | lines | imports from |", "|---|---|---|---|"]
    for room, others in room_imports().items():
        paths = [path for name, path in FILES.items() if room_of(name) == room]
        lines = sum(len(path.read_text().splitlines()) for path in paths)
        cells = [f"`{path_of(room)}`", purpose(room), str(max(round(lines, -2), 100))]
        cells.append(", ".join(map(path_of, others)) or "-")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with its table replaced."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


# --- Picture ----------------------------------------------------------------------------------

WIDTH, BAR, HEIGHT, GAP, TITLE = 960, 700, 34, 12, 150
STYLE = """
text { font-family: sans-serif; font-size: 12px; fill: #222 }
.name { font-size: 14px; font-weight: bold }
.bar { fill: #e9eef6; stroke: #51688f }
.arrow { fill: none; stroke: #7688a8; stroke-width: 1.6 }
.tip { fill: #7688a8 }
"""


def reduced(edges: dict[str, list[str]]) -> dict[str, list[str]]:
    """The imports that no chain of other imports implies (the transitive reduction)."""
    above: dict[str, set[str]] = {}
    for room in ORDER:
        above[room] = set(edges[room]).union(*(above[other] for other in edges[room]))
    return {
        room: [other for other in others if not any(other in above[o] for o in others)]
        for room, others in edges.items()
    }


def ports(edges: dict[str, list[str]]) -> dict[tuple[str, str], tuple[float, float]]:
    """{(room, other): (y where its arrow starts, y where it ends)}, spread over each bar's side."""
    pairs = [(room, other) for room, others in edges.items() for other in others]
    found: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in pairs}
    for place, room in enumerate(ORDER):
        # Arrows to rooms above leave on top, the longest last, so that none cross at the bar.
        own = sorted((p for p in pairs if p[0] == room), key=lambda p: -ORDER.index(p[1]))
        incoming = sorted((p for p in pairs if p[1] == room), key=lambda p: -ORDER.index(p[0]))
        ends = [(p, "start") for p in own] + [(p, "end") for p in incoming]
        for i, (pair, which) in enumerate(ends):
            found[pair][which] = place * (HEIGHT + GAP) + (i + 1) * HEIGHT / (len(ends) + 1)
    return {pair: (ends["start"], ends["end"]) for pair, ends in found.items()}


def bar(room: str, top: float) -> str:
    """A room's bar, with its name and its modules."""
    modules = " ".join(name.rpartition(".")[2] for name in modules_of(room) if name != room)
    lines = textwrap.wrap(modules, 84)
    middle = top + HEIGHT / 2 + 5
    parts = [
        f'<rect class="bar" x="1" y="{top:g}" width="{BAR}" height="{HEIGHT}" rx="5"/>',
        f'<text class="name" x="14" y="{middle:g}">{path_of(room)}</text>',
    ]
    for i, line in enumerate(lines):
        y = middle + 14 * (i - (len(lines) - 1) / 2)
        parts.append(f'<text x="{14 + TITLE}" y="{y:g}">{line}</text>')
    return "".join(parts)


def arrow(start: float, end: float) -> str:
    """An arrow on the right of the bars, wider the more bars it passes."""
    x = BAR + 1
    out = x + min(24 + 0.62 * (start - end), 330)
    return (
        f'<path class="arrow" d="M{x} {start:.1f}C{out:.1f} {start:.1f} {out:.1f} {end:.1f} '
        f'{x + 8} {end:.1f}"/><path class="tip" d="M{x} {end:.1f}l9 -4v8z"/>'
    )


def picture() -> str:
    """The SVG: arrows go from a room to those it imports from, unless a chain implies it."""
    bars = [bar(room, 1 + i * (HEIGHT + GAP)) for i, room in enumerate(ORDER)]
    arrows = [arrow(1 + start, 1 + end) for start, end in ports(reduced(room_imports())).values()]
    height = len(ORDER) * (HEIGHT + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *bars, *arrows, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
    PAGE.write_text(page())
