"""The CSV and PNG files of curves over eps and of transfer matrices, in a work directory.

curves/pgd-20_linf_digits-1.0.0-test.csv, .png   of each attack, norm and set of images
transfer/pgd-20_linf_0.15.csv, .png              rows: made for this model; columns: given to this
"""

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from vit_at.data.examples import file_name
from vit_at.evaluation.transfer import Matrix, matrices
from vit_at.reporting import robustness
from vit_at.reporting.study import attack_name
from vit_at.workdir.files import write_atomically
from vit_at.workdir.outcomes import eps_curves
from vit_at.workdir.results import Results

CURVES_DIRECTORY = "curves"


def write(results: Results, records: Sequence[dict[str, Any]]) -> list[epath.Path]:
    """Writes the curves and matrices of records; returns the paths without their endings."""
    written = []
    directory = results.workdir / CURVES_DIRECTORY
    for curve in eps_curves(results.measured(records)):
        images = re.sub(r"[^\w.]+", "-", curve.points[0].about[0]).strip("-")
        path = directory / file_name(f"{curve.attack}_{curve.norm}_", images, "")
        title = f"{attack_name(curve.attack)}, {curve.robust.shape[1]} images"
        chart = robustness.over_eps(title, {"": curve})
        written.append(_write(path, curve.csv(), chart.png()))
    for matrix in matrices([r for r in records if "transfer" in r["protocol"]]):
        threat = matrix.protocol
        path = results.workdir / f"{matrix.attack}_{threat['norm']}_{threat['eps']:.6g}"
        written.append(_write(path, matrix_csv(matrix), robustness.transfer_map(matrix).png()))
    return written


def _write(path: epath.Path, table: str, picture: bytes) -> epath.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in ((".csv", table), (".png", picture)):
        write_atomically(path.parent / f"{path.name}{ending}", content)
    return path


def matrix_csv(matrix: Matrix) -> str:
    """Rows are the models that the images were made for, columns those that classify them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["made for", *matrix.names, *(f"{n} standard error" for n in matrix.names)])
    for name, shares, errors in zip(
        matrix.names, matrix.accuracy.tolist(), matrix.standard_error.tolist(), strict=True
    ):
        writer.writerow([name, *shares, *errors])
    return text.getvalue()
