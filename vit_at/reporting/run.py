"""One run as the report needs it: configuration, curves and records, without its weights.

A run is read from its work directory, from an export, or from a study file (see ``study_file``),
which holds many.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vit_at.config import evaluation_threat
from vit_at.errors import UserError
from vit_at.schema import check, content_of
from vit_at.training.metrics import METRICS_FILE
from vit_at.workdir.exported import read_description, training_config
from vit_at.workdir.files import is_export, read_config
from vit_at.workdir.outcomes import EpsCurve, eps_curves
from vit_at.workdir.results import Results, read_records

Curve = tuple[Sequence[float], Sequence[float]]  # epochs (or other x), values


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has left.

    name: of its directory. config: nested dicts. curves: {metric: (epochs, values)}.
    records: those of ``results.json``, or of an export what it says of itself. workdir: its work
    directory or export; None if read from a study file.
    """

    name: str
    config: dict[str, Any]
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    records: Sequence[dict[str, Any]] = ()
    workdir: epath.Path | None = None

    @classmethod
    def read(cls, workdir: str | epath.Path) -> "Run":
        """Reads a work directory, where metrics and results may be missing, or an export.

        Raises:
          UserError: it is neither, or a file in it is damaged.
        """
        workdir = epath.Path(workdir)
        if is_export(workdir):
            about = read_description(workdir)
            config = training_config(workdir, about).to_dict()
            return cls(workdir.name, config, {}, about.get("results", []), workdir)
        config = read_config(workdir).to_dict()
        curves = _curves(workdir / METRICS_FILE)
        return cls(workdir.name, config, curves, read_records(workdir), workdir)

    @property
    def tested(self) -> Sequence[dict[str, Any]]:
        """The records of the weights that ``eval.checkpoint`` names; all records if it has none.

        The best weights may be the last, so records of one digest are of the same weights. Of
        weights of several steps, as of a run that was evaluated before its end, the newest.
        """
        which = self.config["eval"]["checkpoint"]
        weights = [record["protocol"]["weights"] for record in self.records]
        digests = {w.get("digest") for w in weights if w.get("checkpoint") == which}
        own = [
            record
            for record, w in zip(self.records, weights, strict=True)
            if w.get("checkpoint") == which or w.get("digest", "") in digests
        ]
        own = own or list(self.records)
        newest = max(map(_step, own), default=0)
        return [record for record in own if _step(record) == newest]

    @property
    def ball(self) -> tuple[str, float]:
        """(norm, eps) of evaluation."""
        threat = evaluation_threat(ConfigDict(self.config))
        return threat.norm, threat.eps

    @property
    def main(self) -> list[dict[str, Any]]:
        """``tested`` without points of curves: of an attack at several eps, that of evaluation."""
        sizes: dict[tuple[str, str], set[float]] = {}
        kinds = [(r["attack"], r["protocol"].get("norm", "")) for r in self.tested]
        for kind, record in zip(kinds, self.tested, strict=True):
            sizes.setdefault(kind, set()).add(record["protocol"].get("eps", 0.0))
        usual = self.ball[1]
        return [
            record
            for kind, record in zip(kinds, self.tested, strict=True)
            if usual not in sizes[kind] or record["protocol"].get("eps") == usual
        ]

    def eps_curves(self) -> list[EpsCurve]:
        """The curves over eps of ``tested``; none of a run from a study file."""
        if self.workdir is None:
            return []
        return eps_curves(Results(self.workdir).measured(self.tested))

    def series(self, name: str) -> Curve:
        """Epochs and values of a metric; empty if it was not logged."""
        return self.curves.get(name, ([], []))


def is_own(record: dict[str, Any], data: Mapping[str, Any]) -> bool:
    """Whether a record is of ``data``'s test split or a slice of it, made square as there."""
    name, _, split = record["protocol"]["data"].rpartition(" ")
    wanted = last_part(data["name"])
    of_tfds = f"{wanted.partition(':')[0]}/"  # its version follows
    same = last_part(name) == wanted or name.startswith(of_tfds)
    transform = record["protocol"].get("transform", "squash")
    test = data["test_split"]
    tests = split == test or split.startswith(f"{test}[")
    return same and tests and transform == data["transform"]


def last_part(data: str) -> str:
    """'folder:/home/me/flowers test' -> 'folder:flowers test'; other data sets as they are."""
    return re.sub(r"^(folder|npy|npz):.*/(?=[^/])", r"\1:", data, flags=re.DOTALL).rstrip("/")


def _step(record: dict[str, Any]) -> int:
    return record["protocol"]["weights"].get("step", 0)


def _curves(path: epath.Path) -> dict[str, Curve]:
    """The curves of a metrics file, up to a line that a crash cut short."""
    lines, remedy = [], "restore it, or move it away to report without curves"
    content = content_of(path, remedy) if path.exists() else b""
    for text in content.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        check(line, dict[str, float], path, remedy, inside=f"line {len(lines) + 1}")
        if not line.get("step", 0) > 0:
            raise UserError(f"{path} is damaged (line {len(lines) + 1} has no step); {remedy}")
        lines.append(line)
    per_step = next((line["epoch"] / line["step"] for line in lines if line.get("epoch")), 0.0)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        epoch = line.get("epoch", per_step * line["step"])
        for name in line.keys() - {"step", "epoch"}:
            epochs, values = curves.setdefault(name, ([], []))
            epochs.append(epoch)
            values.append(line[name])
    return curves


def thin(xs: Sequence[float], ys: Sequence[float], most: int) -> Curve:
    """At most ``most`` points, each the mean of equally many neighbours (the last of fewer)."""
    width = -(-len(xs) // most)
    if width <= 1:
        return xs, ys
    starts = range(0, len(xs), width)
    means = [[float(np.mean(v[i : i + width])) for i in starts] for v in (xs, ys)]
    return means[0], means[1]
