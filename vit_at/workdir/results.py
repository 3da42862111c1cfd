"""The results of a work directory, each with the protocol it was measured under.

results.json      one record per evaluation: attack, accuracy, protocol
per_example.npz   for each record the images' places in their split, and which were correct; of
                  clean images also labels, predictions and margins
per_example.csv   the same as a table, one row an image
"""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_at import schema
from vit_at.data.examples import Examples
from vit_at.errors import UserError, in_one_line
from vit_at.workdir.files import write_atomically
from vit_at.workdir.outcomes import ARRAYS, Measured, in_255ths, notes, table, threats

RESULTS_FILE, PER_EXAMPLE_FILE = "results.json", "per_example.npz"
TABLE_FILE = "per_example.csv"
AUTOATTACK = "autoattack"  # loss in the protocol of its records, and name of the standard cascade


class Results:
    """``results.json`` and ``per_example.npz`` of a work directory; rewritten atomically.

    Both are read and checked at once, before an evaluation that would add to them.

    Raises:
      UserError: one of them is damaged, or of another kind.
    """

    def __init__(self, workdir: epath.Path):
        self.workdir = workdir
        self.records = read_records(workdir)
        self._arrays = _read_outcomes(workdir / PER_EXAMPLE_FILE)

    def find(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """The stored record of the same attack and protocol; None: there is none."""
        return next((r for r in self.records if _identity(r) == _identity(entry)), None)

    def add(
        self,
        entry: dict[str, Any],
        correct: np.ndarray,
        examples: Examples,
        answers: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Stores a record and its outcomes; replaces an earlier record of the same protocol.

        answers: of clean images, 'label', 'prediction' and 'margin' [N].

        Raises:
          UserError: they can't be written; it says where the result is instead.
        """
        self.records = [r for r in self.records if _identity(r) != _identity(entry)] + [entry]
        arrays = {"index": examples.indices, "correct": correct}
        if answers:
            arrays |= {**answers, "class_names": np.array(examples.class_names, str)}
        self._arrays |= {f"{_key(entry)}/{name}": array for name, array in arrays.items()}
        if jax.process_index():
            return
        content = io.BytesIO()
        np.savez_compressed(content, **self._arrays)
        files: dict[str, str | bytes] = {PER_EXAMPLE_FILE: content.getvalue()}
        files[RESULTS_FILE] = json.dumps(self.records, indent=2) + "\n"
        files[TABLE_FILE] = table(self.measured(self.records))
        try:
            _write(files, self.workdir)
        except Exception as error:  # of the disk, or a bucket
            raise UserError(_rescued(files, self.workdir, entry, error)) from error

    def outcomes(self, entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """(places in the split [N], correct [N] bool) of a record; None if they are not stored."""
        (found,) = self.measured([entry]) or [None]
        return found and (found.index, found.correct)

    def measured(self, records: Sequence[dict[str, Any]]) -> list[Measured]:
        """Those of the records whose outcomes are stored, with these."""
        found = []
        for entry in records:
            arrays = {name: self._arrays.get(f"{_key(entry)}/{name}") for name in ARRAYS}
            if arrays["correct"] is not None:
                found.append(Measured(entry, **arrays))
        return found


def read_records(workdir: epath.Path) -> list[dict[str, Any]]:
    """The records of ``results.json``; none if it is missing. UserError if it is damaged."""
    path = workdir / RESULTS_FILE
    if not path.exists():
        return []
    remedy = "restore it, or move it away to measure its results again"
    return check_records(schema.read_json(path, list[Any], remedy), path, remedy)


def check_records(
    records: list[Any], path: epath.Path, remedy: str, *, what: str = "damaged", inside: str = ""
) -> list[dict[str, Any]]:
    """The records; UserError if one has a wrong shape. The rest is as in ``schema.check``."""
    for i, record in enumerate(records):
        place = f"{inside}[{i}]"
        schema.check(record, schema.Record, path, remedy, what=what, inside=place)
        protocol, kind = record["protocol"], schema.Protocol
        if "norm" in protocol:
            kind = schema.StepsProtocol if "step_size" in protocol else schema.ThreatProtocol
        elif "union" in protocol:
            kind = schema.UnionProtocol
        schema.check(protocol, kind, path, remedy, what=what, inside=f"{place}.protocol")
    return records


def _read_outcomes(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of ``per_example.npz``, each record's two of one length."""
    if not path.exists():
        return {}
    remedy = (
        f"move it away and run the same command again: {RESULTS_FILE} keeps the accuracies, only "
        "the outcomes of single images are lost"
    )
    arrays = schema.read_arrays(path, remedy)
    for key in sorted({name.rpartition("/")[0] for name in arrays}):
        index = schema.check_array(arrays, f"{key}/index", "integers", (-1,), path, remedy)
        schema.check_array(arrays, f"{key}/correct", "bool", index.shape, path, remedy)
        if f"{key}/label" in arrays:
            _check_answers(arrays, key, index.shape, path, remedy)
    return arrays


def _check_answers(
    arrays: dict[str, np.ndarray], key: str, shape: tuple[int, ...], path: epath.Path, remedy: str
) -> None:
    """Checks labels, predictions and margins of the clean images of a record."""
    names = schema.check_array(arrays, f"{key}/class_names", "text", (-1,), path, remedy)
    schema.check_array(arrays, f"{key}/margin", "floats", shape, path, remedy)
    for name in ("label", "prediction"):
        found = schema.check_array(arrays, f"{key}/{name}", "integers", shape, path, remedy)
        if not np.isin(found, np.arange(len(names))).all():
            raise UserError(f"{path} is damaged (a number in '{key}/{name}' is no class); {remedy}")


def _write(files: dict[str, str | bytes], directory: epath.Path) -> None:
    for name, content in files.items():
        write_atomically(directory / name, content)


def _rescued(
    files: dict[str, str | bytes], workdir: epath.Path, entry: dict[str, Any], error: Exception
) -> str:
    """Writes the files to a temporary directory; a sentence that says where the result is."""
    reason = in_one_line(error)
    begin = f"{workdir} could not be written ({reason}), but {entry['attack']} has been measured"
    try:
        place = epath.Path(tempfile.mkdtemp(prefix="vit_at-"))
        _write(files, place)
    except OSError:
        return f"{begin}, and its record is {json.dumps(entry)}; keep this line and free some space"
    return (
        f"{begin} (accuracy {entry['accuracy']:.2%}) and is stored in {place}: free some space and "
        f"copy {RESULTS_FILE} and {PER_EXAMPLE_FILE} from there to the work directory"
    )


def _key(entry: dict[str, Any]) -> str:
    """'DIGEST/DATA/359 clean', or '.../359 pgd-20 linf 0.15 step 0.0375 x1 seed 0'."""
    protocol = entry["protocol"]
    contents = f" {protocol['contents']}" if "contents" in protocol else ""
    place = f"{protocol['weights']['digest']}/{protocol['data']}{contents}"
    key = f"{place}/{protocol['num_examples']} {entry['attack']}"
    key += "".join(f" {note}" for note in notes(protocol))
    for threat in threats(protocol):
        key += f" {threat['norm']} {threat['eps']!r}"
        if "step_size" in threat:
            key += f" step {threat['step_size']!r} x{protocol.get('restarts', 1)}"
        key += f" seed {protocol['seed']}"
    return key + (f" from {protocol['transfer']['digest']}" if "transfer" in protocol else "")


def _identity(entry: dict[str, Any]) -> str:
    protocol = {"transform": "squash"}  # which earlier records leave out
    protocol |= {k: v for k, v in entry["protocol"].items() if k != "packages"}
    return json.dumps([entry["attack"], protocol], sort_keys=True)


def as_text(records: Sequence[dict[str, Any]]) -> str:
    """Records as aligned text, one line each."""
    lines = [f"{'attack':<10} {'accuracy':>9}   images  protocol"]
    for entry in records:
        protocol, threat = entry["protocol"], ""
        for part in threats(protocol):
            threat += f"{part['norm']} eps {in_255ths(part['eps'])}, "
            if "step_size" in part:
                step = in_255ths(part["step_size"])
                threat += f"step {step}, {protocol.get('restarts', 1)} restart(s), "
        if "transfer" in protocol:
            threat += "from {source} to {target}, ".format(**protocol["transfer"])
        error = 100 * entry["standard_error"]
        lines.append(
            f"{entry['attack']:<10} {100 * entry['accuracy']:6.2f} %  "
            f"{protocol['num_examples']:>7}  {threat}"
            f"{', '.join([protocol['data'], *notes(protocol)])} (s.e. {error:.2f})"
        )
    return "\n".join(lines)
