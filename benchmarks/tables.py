"""Writes the tables of the documentation from the JSON files of the benchmarks.

    python benchmarks/tables.py

A table follows a line ``<!-- KIND FILE... -->``; FILE.json is in results/. A row of a later file
replaces that of an earlier one, which was measured again.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from common import ROOT

PAGES = [ROOT / "docs" / name for name in ("performance.md", "recipes.md")]
RESULTS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"^<!-- (\w+) ([\w. ]+) -->\n+(?:\|.*\n)*\n*", re.MULTILINE)
_OBJECTIVES = {"at": "AT", "trades": "TRADES", "mart": "MART", "pgd": "PGD-20"}
_EAGER = "torch eager float32"
_SUBJECTS = {  # the columns of a step, but for ours in float32
    "vit_at bfloat16": "ours, bfloat16",
    _EAGER: "PyTorch eager",
    "torch compile bfloat16": "PyTorch compiled, bfloat16",
    "torch compile bfloat16, CUDA graphs": "the same with CUDA graphs",
}
_ALWAYS = tuple(_SUBJECTS)[:3]  # also where a file lacks them, so that files share a table
Rows = Iterator[list[str]]


def main() -> None:
    """The command line."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def filled(page: str) -> str:
    """The page with the tables of today's files."""

    def table(found: re.Match) -> str:
        files = [json.loads((RESULTS / f"{name}.json").read_text()) for name in found[2].split()]
        header, *rows = (row for content in files for row in TABLES[found[1]](content))
        rows = list({row[0]: row for row in rows if row != header}.values())
        lines = [found[0].split("\n")[0], ""]
        lines += [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
        return "\n".join([*lines, "", ""])

    return _MARKED.sub(table, page)


def _steps(content: dict[str, Any]) -> Rows:
    """Seconds per step with quartiles, and the time over ours; memory of ours, then eager."""
    shown = {n for measured in content["cases"] for n in measured["results"]} | set(_ALWAYS)
    columns = [name for name in _SUBJECTS if name in shown]
    heads = ["objective", "ours, s", "of the matmul peak"]
    yield [*heads, *(_SUBJECTS[name] for name in columns), "peak memory, MiB: ours, eager"]
    for measured in content["cases"]:
        case, results = measured["case"], measured["results"]
        ours = results["vit_at float32"]
        low, high = ours["quartiles_s"]
        row = [_OBJECTIVES[case["objective"]]]
        if case["masked"]:
            row[0] += f", ARD + PRM, keep {case['keep']:g}"
        row.append(f"{ours['median_s']:.2f} ({low:.2f} - {high:.2f})")
        row.append(f"{100 * ours['utilisation']:.0f} %")
        for name in columns:
            seconds = results.get(name, {}).get("median_s")
            ratio = f"{seconds:.2f}, {seconds / ours['median_s']:.2f} x" if seconds else "-"
            row.append(ratio)
        memory = [results[name]["peak_memory"] / 2**20 for name in ("vit_at float32", _EAGER)]
        yield [*row, "{:.0f}, {:.0f}".format(*memory)]


def _contestants(content: dict[str, Any]) -> Rows:
    """One row for each contestant of each case: those of a GPU, where none is ours in float32."""
    yield ["contestant", "case", "ms (quartiles)", "images/s", "of the matmul peak", "peak MiB"]
    for measured in content["cases"]:
        for name, row in measured["results"].items():
            low, high = (f"{1000 * seconds:.0f}" for seconds in row["quartiles_s"])
            yield [
                name.replace("torch", "PyTorch"),
                measured["title"],
                f"{1000 * row['median_s']:.0f} ({low} - {high})",
                f"{row['images_per_second']:,.0f}",
                f"{100 * row['utilisation']:.0f} %",
                f"{row['peak_memory'] / 2**20:,.0f}",
            ]


def _scaling(content: dict[str, Any]) -> Rows:
    yield ["what varies", "images/s"]
    for kind in dict.fromkeys(point["kind"] for point in content["points"]):
        points = [p for p in content["points"] if p["kind"] == kind and "error" not in p]
        values = ", ".join(str(point["value"]) for point in points)
        yield [f"{kind}: {values}", ", ".join(f"{p['images_per_second']:.3g}" for p in points)]


def _costs(content: dict[str, Any]) -> Rows:
    yield ["method", "passes", "on paper", "measured"]
    for name, one in content["methods"].items():
        yield [name, f"{one['passes']:g}", f"{one['paper']:.2f}", f"{one['ratio']:.2f}"]


TABLES = {"steps": _steps, "contestants": _contestants, "scaling": _scaling, "costs": _costs}

if __name__ == "__main__":
    main()
