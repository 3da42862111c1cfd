"""The results of a work directory, each with the protocol it was measured under.

results.json      one record per evaluation: attack, accuracy, protocol
per_example.npz   for each record the images' places in their split, and which were correct
"""

import io
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_at.data.sources import Examples
from vit_at.workdir.files import read_json, write_atomically

RESULTS_FILE, PER_EXAMPLE_FILE = "results.json", "per_example.npz"
AUTOATTACK = "autoattack"  # loss in the protocol of its records, and name of the standard cascade


class Results:
    """``results.json`` and ``per_example.npz`` of a work directory; rewritten atomically."""

    def __init__(self, workdir: epath.Path):
        self.workdir = workdir
        self._json, self._npz = workdir / RESULTS_FILE, workdir / PER_EXAMPLE_FILE
        self.records: list[dict[str, Any]] = []
        if self._json.exists():
            self.records = read_json(self._json)

    def find(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """The stored record of the same attack and protocol; None: there is none."""
        return next((r for r in self.records if _identity(r) == _identity(entry)), None)

    def add(self, entry: dict[str, Any], correct: np.ndarray, examples: Examples) -> None:
        """Stores a record and its outcomes; replaces an earlier record of the same protocol."""
        if jax.process_index():
            return
        self.records = [r for r in self.records if _identity(r) != _identity(entry)] + [entry]
        key = _key(entry)
        added = {f"{key}/index": examples.indices, f"{key}/correct": correct}
        content = io.BytesIO()
        np.savez_compressed(content, **self._arrays() | added)
        write_atomically(self._npz, content.getvalue())
        write_atomically(self._json, json.dumps(self.records, indent=2) + "\n")

    def outcomes(self, entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """(places in the split [N], correct [N] bool) of a record; None if they are not stored."""
        arrays, key = self._arrays(), _key(entry)
        if f"{key}/index" not in arrays:
            return None
        return arrays[f"{key}/index"], arrays[f"{key}/correct"]

    def _arrays(self) -> dict[str, np.ndarray]:
        if not self._npz.exists():
            return {}
        with np.load(self._npz.open("rb")) as archive:
            return dict(archive)


def _key(entry: dict[str, Any]) -> str:
    """'DIGEST/DATA/359 clean', or '.../359 pgd-20 linf 0.15 step 0.0375 x1 seed 0'."""
    protocol = entry["protocol"]
    place = f"{protocol['weights']['digest']}/{protocol['data']}"
    key = f"{place}/{protocol['num_examples']} {entry['attack']}"
    if "norm" in protocol:
        key += f" {protocol['norm']} {protocol['eps']!r}"
        if "step_size" in protocol:
            key += f" step {protocol['step_size']!r} x{protocol['restarts']}"
        key += f" seed {protocol['seed']}"
    return key


def _identity(entry: dict[str, Any]) -> str:
    protocol = {k: v for k, v in entry["protocol"].items() if k != "packages"}
    return json.dumps([entry["attack"], protocol], sort_keys=True)


def as_text(records: Sequence[dict[str, Any]]) -> str:
    """Records as aligned text, one line each."""
    lines = [f"{'attack':<10} {'accuracy':>9}   images  protocol"]
    for entry in records:
        protocol = entry["protocol"]
        threat = ""
        if "norm" in protocol:
            threat = f"{protocol['norm']} eps {in_255ths(protocol['eps'])}, "
        if "step_size" in protocol:
            step = in_255ths(protocol["step_size"])
            threat += f"step {step}, {protocol['restarts']} restart(s), "
        error = 100 * entry["standard_error"]
        lines.append(
            f"{entry['attack']:<10} {100 * entry['accuracy']:6.2f} %  "
            f"{protocol['num_examples']:>7}  {threat}{protocol['data']} (s.e. {error:.2f})"
        )
    return "\n".join(lines)


def in_255ths(value: float) -> str:
    """0.03137 -> '8/255'; other values as decimals."""
    scaled = value * 255
    return f"{round(scaled)}/255" if abs(scaled - round(scaled)) < 1e-6 else f"{value:.4g}"
