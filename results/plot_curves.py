"""Draws the training curves of runs: python results/plot_curves.py OUT.png NAME=metrics.jsonl ...

Needs matplotlib. Left: loss; right: accuracy on held-out images, clean (dashed) and under attack.
"""

import json
import pathlib
import sys

import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: safe for colour-blind eyes


def series(path: str, field: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a field, over the lines that have it."""
    lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    steps_per_epoch = next(line["step"] / line["epoch"] for line in lines if "loss" in line)
    points = [(line["step"] / steps_per_epoch, line[field]) for line in lines if field in line]
    return [x for x, _ in points], [y for _, y in points]


def attack_field(path: str) -> str | None:
    """The validation attack of a run, such as 'validation/pgd-10'."""
    text = pathlib.Path(path).read_text()
    names = {name for line in text.splitlines() for name in json.loads(line)}
    attacks = sorted(n for n in names if n.startswith("validation/") and not n.endswith("clean"))
    return attacks[0] if attacks else None


def main(out: str, *runs: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for colour, run in zip(COLOURS, runs, strict=False):
        name, _, path = run.partition("=")
        left.plot(*series(path, "loss"), color=colour, label=name, linewidth=1.2)
        clean = series(path, "validation/clean")
        right.plot(*clean, color=colour, linestyle="--", marker="o", markersize=3)
        if field := attack_field(path):
            label = f"{name}, {field.removeprefix('validation/')}"
            right.plot(*series(path, field), color=colour, marker="o", markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="validation accuracy (dashed: clean)", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
