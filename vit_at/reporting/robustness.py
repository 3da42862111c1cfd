"""What evaluations say of robustness: a headline, curves over eps, transfer matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_at.evaluation.transfer import Matrix
from vit_at.reporting import charts, pictures
from vit_at.reporting.charts import Section
from vit_at.reporting.run import Run, is_own
from vit_at.reporting.study import Group, Table, accuracies, attack_name, mean_and_deviation
from vit_at.workdir.outcomes import EpsCurve, in_255ths, threats

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def headline(run: Run) -> str:
    """One sentence: the lowest accuracy under the threat of evaluation, and that on clean images.

    Of the run's own test split, where there is such a record; '' of a run that was not evaluated.
    """
    own = [r for r in run.tested if is_own(r, run.config["data"])]
    records = own or run.tested
    attacked = [r for r in records if threats(r["protocol"])]
    attacked = [r for r in attacked if _ball(r) == run.ball] or attacked
    measured = max(attacked or records, key=lambda r: r["protocol"]["num_examples"], default=None)
    if measured is None:
        return ""
    about = measured["protocol"]
    which = "test images" if own else f"images of {about['data']}"
    images = f"{about['num_examples']} {which}"
    clean = [r for r in records if r["attack"] == "clean" and _images(r) == _images(measured)]
    right = f"{_percent(clean[-1]['accuracy'])} are right without attack" if clean else ""
    if not attacked:
        return f"Of {images}, {right}; no attack has been evaluated."
    same = (r for r in attacked if _images(r) == _images(measured))
    lowest = min(same, key=lambda r: r["accuracy"])
    sizes = " and ".join(
        f"{_NORMS[t['norm']]} eps {in_255ths(t['eps'])}" for t in threats(lowest["protocol"])
    )
    return (
        f"{_percent(lowest['accuracy'])} of {images} withstand {attack_name(lowest['attack'])} at "
        f"{sizes} (standard error {100 * lowest['standard_error']:.1f})"
        f"{'; ' if right else ''}{right}."
    )


def compared_headline(members: Sequence[Group], table: Table) -> str:
    """One sentence: the adversarial training that is best under the strongest common attack."""
    trained = [group for group in members if not group.natural]
    attacks = [c for c in charts.common_columns(members, table) if c.attack != "clean"]
    if len(trained) < 2 or not attacks:
        return ""
    column = attacks[0]
    measured = {group.name: accuracies(group) for group in trained}
    best = max(measured, key=lambda name: float(np.mean(measured[name][column])))
    clean = [
        f"; {mean_and_deviation(values)} % are right without attack"
        for other, values in measured[best].items()
        if other.attack == "clean" and other.num_examples == column.num_examples
    ]
    size = f" at {_NORMS[column.norm]} eps {in_255ths(column.eps)}" if column.norm else ""
    return (
        f"Of {len(trained)} adversarial trainings, {best} has the highest robust accuracy: "
        f"{mean_and_deviation(measured[best][column])} % of {column.num_examples} test images "
        f"withstand {attack_name(column.attack)}{size}{''.join(clean[:1])}."
    )


def _ball(record: dict[str, Any]) -> tuple[str, float] | None:
    protocol = record["protocol"]
    return (protocol["norm"], protocol["eps"]) if "norm" in protocol else None


def _images(record: dict[str, Any]) -> tuple[str, int]:
    return record["protocol"]["data"], record["protocol"]["num_examples"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def over_eps(title: str, curves: Mapping[str, EpsCurve]) -> pictures.Chart:
    """Named curves of accuracy over eps in one norm, with standard errors."""
    lines = {name: (curve.eps, curve.accuracy.tolist()) for name, curve in curves.items()}
    errors = {name: curve.standard_error.tolist() for name, curve in curves.items()}
    norm = _NORMS[next(iter(curves.values())).norm]
    look: dict[str, Any] = {"percent": True, "marked": True, "eps": True}
    return pictures.line_chart(title, lines, x=f"{norm} eps", errors=errors, **look)


def stored_curves(runs: Mapping[str, Run]) -> Section | None:
    """The curves over eps of runs by name, as ``vit-at evaluate`` has measured them.

    One chart for each attack and norm; None if there are none.
    """
    found: dict[str, dict[str, EpsCurve]] = {}
    for name, run in runs.items():
        for curve in run.eps_curves():
            title = f"{attack_name(curve.attack)}, {_NORMS[curve.norm]}"
            found.setdefault(title, {})[name] = curve
    if not found:
        return None
    counts = {curve.robust.shape[1] for curves in found.values() for curve in curves.values()}
    images = " or ".join(str(count) for count in sorted(counts))
    note = (
        f"{images} test images. Whiskers are one standard error. An image that is broken at an eps "
        "counts as broken at every larger one."
    )
    drawn = tuple(over_eps(title, curves).svg() for title, curves in found.items())
    return Section("Robustness over eps", note, drawn)


def transfers(matrices: Sequence[Matrix]) -> Section | None:
    """A heat map of each transfer matrix; None if there are none."""
    if not matrices:
        return None
    note = (
        f"Accuracy in per cent on {matrices[0].protocol['num_examples']} test images, with the "
        "standard error. On the diagonal, a model is attacked itself."
    )
    return Section("Transfer", note, tuple(transfer_map(m).svg() for m in matrices))


def transfer_map(matrix: Matrix) -> pictures.Chart:
    """The heat map of a transfer matrix."""
    threat = matrix.protocol
    size = f"{_NORMS[threat['norm']]} eps {in_255ths(threat['eps'])}"
    title = f"{attack_name(matrix.attack)}, {size}: % correct"
    ends = {"rows": "images made for", "columns": "classified by"}
    return pictures.heat_map(title, matrix.names, matrix.accuracy, matrix.standard_error, **ends)
