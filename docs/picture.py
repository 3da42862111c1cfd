#!/usr/bin/env python3
"""Draws the picture of the README: test images, attacked ones, and where the model looks.

    python docs/picture.py EXPORT [--data_dir=DIR] [--count=8] [--out=docs/attacked.png]

EXPORT is a directory that 'vit-at export' has written. The images are the first of its test split,
attacked as in the report: by PGD-20 at the eps of training.
"""

import argparse
import pathlib

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from vit_at.reporting.exhibits import STEPS, Attacked, Exhibits
from vit_at.reporting.pictures import heat
from vit_at.workdir.exported import load_exported
from vit_at.workdir.results import in_255ths

OUT = pathlib.Path(__file__).parent / "attacked.png"
RIGHT, WRONG = "#1a7f37", "#b35900"


def draw(shown: Attacked, names: tuple[str, ...], attack: str) -> Figure:
    """Four rows of images; under each image, what the model takes it for."""
    clean, attacked = shown.images, shown.adversarial
    looks = [
        [heat(*pair) for pair in zip(*of, strict=True)]
        for of in zip(shown.rollout, (clean, attacked), strict=True)
    ]
    rows = {
        "test image": (clean, shown.clean_probabilities),
        f"after {attack}": (attacked, shown.adversarial_probabilities),
        "attention": (looks[0], None),
        "attention,\nattacked": (looks[1], None),
    }
    count = len(clean)
    figure = Figure(figsize=(1.05 * count + 1, 4.9), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    axes = figure.subplots(len(rows), count)
    for line, (title, (images, probabilities)) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for i, (panel, image) in enumerate(zip(line, images, strict=True)):
            panel.imshow(np.asarray(image).squeeze(), cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set_visible(False)
            if probabilities is not None:
                best = int(probabilities[i].argmax())
                text = f"{names[best]} {100 * probabilities[i, best]:.0f} %"
                panel.set_xlabel(
                    text, color=RIGHT if best == shown.labels[i] else WRONG, labelpad=2
                )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", metavar="EXPORT")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--out", default=OUT, type=pathlib.Path)
    options = parser.parse_args()
    trained = load_exported(options.export)
    config = trained.config.copy_and_resolve_references().unlock()
    config.data.dir = options.data_dir or config.data.dir
    exhibits = Exhibits(trained._replace(config=config))
    shown = exhibits.attacked(options.count)
    with rc_context({"font.size": 8.5, "font.family": "DejaVu Sans"}):
        attack = f"PGD-{STEPS},\neps {in_255ths(config.threat.eps)}"
        draw(shown, exhibits.class_names, attack).savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
