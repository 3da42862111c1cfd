"""What the outcomes of single images say together: a table, and curves over eps.

table        ``per_example.csv``: one row an image
eps_curves   accuracy over eps, of each attack that was run at several
union        the worst case over several evaluations

An adversarial image of a small ball lies in each larger one. So an image that is broken at an eps
counts as broken at every larger eps, in a curve and in the table.
"""

import collections
import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

ARRAYS = ("index", "correct", "label", "prediction", "margin", "class_names")
_IMAGE = ("data", "weights", "image")
_CLEAN = ("label", "class_name", "clean_prediction", "predicted_class_name", "clean_margin")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A record with the outcomes of its images.

    index: [N] places in the split. correct: [N] bool. label, prediction: [N] and margin: [N], the
    label's logit minus the largest other one, of clean images; class_names: by label. None if not
    stored.
    """

    record: dict[str, Any]
    index: np.ndarray
    correct: np.ndarray
    label: Any = None
    prediction: Any = None
    margin: Any = None
    class_names: Any = None

    @property
    def eps(self) -> float:
        """0 of clean images."""
        return self.record["protocol"].get("eps", 0.0)

    @property
    def about(self) -> tuple[str, str]:
        """(data, digest of the weights): evaluations of the same images and model. Images made
        square otherwise, chosen by a list or evaluated in another precision are other data.
        """
        protocol = self.record["protocol"]
        return ", ".join([protocol["data"], *notes(protocol)]), protocol["weights"]["digest"]


def threats(protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """The norm, eps and step size of a protocol; several of a union, none of clean images."""
    return protocol.get("union", [protocol] if "norm" in protocol else [])


def notes(protocol: dict[str, Any]) -> list[str]:
    """What is unusual: how images were chosen and made square, and the products' precision."""
    found = {name: protocol.get(name) for name in ("transform", "ids", "precision")}
    usual = (None, "squash", "float32")
    return [f"{name} {value}" for name, value in found.items() if value not in usual]


def in_255ths(value: float) -> str:
    """0.03137 -> '8/255'; other values, and those of few digits such as 0.2, as decimals."""
    scaled, decimal = value * 255, f"{value:.4g}"
    fraction = abs(scaled - round(scaled)) < 1e-6 and abs(float(decimal) - value) > 1e-9
    return f"{round(scaled)}/255" if fraction else decimal


def union(parts: Sequence[Measured]) -> np.ndarray:
    """[N] bool: correct in every one of the evaluations, of the same images."""
    return np.all([part.correct for part in parts], axis=0)


# --- Curves -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EpsCurve:
    """An attack at several eps, of one model and the same images.

    points: by growing eps; the clean images first, if these were measured.
    """

    attack: str
    norm: str
    points: tuple[Measured, ...]

    @property
    def eps(self) -> list[float]:
        return [point.eps for point in self.points]

    @property
    def robust(self) -> np.ndarray:
        """[E, N] bool: withstands the attack at this eps, and at each smaller one."""
        return np.logical_and.accumulate([point.correct for point in self.points])

    @property
    def accuracy(self) -> np.ndarray:
        """[E] shares."""
        return self.robust.mean(1)

    @property
    def standard_error(self) -> np.ndarray:
        """[E], of a share of independent images."""
        return np.sqrt(self.accuracy * (1 - self.accuracy) / self.robust.shape[1])

    def name(self, exact: bool = False) -> str:
        """That of the table's column; exact: with all that tells it from other curves."""
        words, protocol = [self.attack, self.norm], self.points[-1].record["protocol"]
        if exact:
            words += [f"x{protocol.get('restarts', 1)}", f"seed {protocol['seed']}"]
        return " ".join([*words, "broke at eps"])

    def csv(self) -> str:
        """One row an eps; 'single_accuracy' is that of the attack at this eps alone."""
        columns = ("data", "num_examples", "seed", "restarts", "step_size")
        header = ["attack", "norm", "eps", "accuracy", "standard_error", "single_accuracy"]
        rows = []
        for point, accuracy, error in zip(
            self.points, self.accuracy.tolist(), self.standard_error.tolist(), strict=True
        ):
            row = [self.attack, self.norm, point.eps, accuracy, error, point.record["accuracy"]]
            rows.append(row + [point.record["protocol"].get(name, "") for name in columns])
        return _csv([*header, *columns], rows)


def eps_curves(measured: Sequence[Measured]) -> list[EpsCurve]:
    """The curves of these evaluations: of each attack that was run at two eps or more.

    Only the step size may differ within a curve. Of evaluations at one eps, the last counts.
    """
    measured = _current(measured)
    clean = {(m.about, _images(m)): m for m in measured if m.record["attack"] == "clean"}
    groups: dict[str, dict[float, Measured]] = {}
    for m in measured:
        protocol = dict(m.record["protocol"])
        if "norm" in protocol and "transfer" not in protocol:
            same = {k: v for k, v in protocol.items() if k not in ("eps", "step_size", "packages")}
            key = json.dumps([m.record["attack"], same, _images(m)], sort_keys=True)
            groups.setdefault(key, {})[m.eps] = m
    curves = []
    for points in groups.values():
        if len(points) > 1:
            first = next(iter(points.values()))
            known = [clean[k]] if (k := (first.about, _images(first))) in clean else []
            ordered = (*known, *(points[eps] for eps in sorted(points)))
            norm = first.record["protocol"]["norm"]
            curves.append(EpsCurve(first.record["attack"], norm, ordered))
    return curves


def _current(measured: Sequence[Measured]) -> list[Measured]:
    """Without evaluations of images that have changed since, by those that were made last."""

    def source(m: Measured) -> tuple[str, str]:
        return m.record["protocol"]["data"], m.about[1]

    contents = [m.record["protocol"].get("contents") for m in measured]
    last = {source(m): found for m, found in zip(measured, contents, strict=True)}
    return [m for m, found in zip(measured, contents, strict=True) if found == last[source(m)]]


def _images(measured: Measured) -> str:
    """Identifies the images, in their order."""
    return measured.index.astype(np.int64).tobytes().hex()


# --- The table --------------------------------------------------------------------------------


def table(measured: Sequence[Measured]) -> str:
    """CSV with a row for each image: what the model says of it, and each attack's outcome.

    An outcome is 1 if the image is classified correctly after the attack, else 0, and empty if it
    was not measured. For an attack at several eps, a further column has the smallest eps at which
    it broke the image: 0 if the clean image is wrong already, empty if none did.
    """
    measured = _current(measured)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    records = [m.record for m in measured]
    names = _apart([_name(r) for r in records], [_name(r, exact=True) for r in records])
    for m, name in zip(measured, names, strict=True):
        for i, (place, correct) in enumerate(zip(_places(m), m.correct.tolist(), strict=True)):
            row = rows.setdefault((*m.about, *place), {})
            row[name] = int(correct)
            if m.label is not None:
                row |= _answers(m, i)
    curves = eps_curves(measured)
    broke = _apart([curve.name() for curve in curves], [curve.name(exact=True) for curve in curves])
    for curve, name in zip(curves, broke, strict=True):
        falls = curve.robust.sum(0)  # how many points an image withstands
        first = curve.points[0]
        for place, count in zip(_places(first), falls.tolist(), strict=True):
            if count < len(curve.points):
                rows[(*first.about, *place)][name] = curve.eps[count]
    columns = dict.fromkeys([*_CLEAN, *names, *broke])
    cells = [
        [*key[: len(_IMAGE)], *(rows[key].get(column, "") for column in columns)]
        for key in sorted(rows)
    ]
    return _csv([*_IMAGE, *columns], cells)


def _places(m: Measured) -> list[tuple[int, int]]:
    """(place, how many images before it have the same one, in another split) of each image."""
    seen: collections.Counter[int] = collections.Counter()
    found = []
    for place in m.index.tolist():
        found.append((place, seen[place]))
        seen[place] += 1
    return found


def _answers(m: Measured, i: int) -> dict[str, Any]:
    label, prediction = int(m.label[i]), int(m.prediction[i])
    names, margin = m.class_names, float(f"{m.margin[i]:.6g}")
    values = (label, str(names[label]), prediction, str(names[prediction]), margin)
    return dict(zip(_CLEAN, values, strict=True))


def _apart(short: Sequence[str], exact: Sequence[str]) -> list[str]:
    """The short names, or the exact ones where several share a short one."""
    alike = {name: {e for s, e in zip(short, exact, strict=True) if s == name} for name in short}
    return [e if len(alike[s]) > 1 else s for s, e in zip(short, exact, strict=True)]


def _name(record: dict[str, Any], exact: bool = False) -> str:
    """Of a record's column: 'pgd-20 linf 8/255'; exact: with all that tells it from others."""
    protocol = record["protocol"]
    words = [record["attack"]]
    for threat in threats(protocol):
        size = repr(threat["eps"]) if exact else in_255ths(threat["eps"])
        words += [threat["norm"], size]
        if exact and "step_size" in threat:
            words += [f"step {threat['step_size']!r}", f"x{protocol.get('restarts', 1)}"]
    if "transfer" in protocol:
        words.append("from {source} to {target}".format(**protocol["transfer"]))
    if exact and threats(protocol):
        words.append(f"seed {protocol['seed']}")
    return " ".join(words)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()
