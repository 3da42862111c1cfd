"""Many runs in one JSON file: what they share is stored once, what differs is stored with each run.

    vit-at report runs/NAME-sweep --out=study.json    # writes one
    vit-at report study.json --out=table.md           # reads it

    format     this format's name
    commands   how the runs were started  }
    machine    what they ran on           }  empty at first; fill them in by hand,
    notes      anything else              }  a later write keeps them
    config     the fields that all runs share, as {dotted name: value}
    protocols  for each attack, the fields of the protocol that all its records share
    runs       a line for each: name, the other fields, records, curves

Weights and per-image outcomes are not stored, nor are ``data.dir`` and
``data.decoded_dir``, paths of the machine.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from vit_at.config import flatten, nested
from vit_at.errors import UserError
from vit_at.reporting.run import Curve, Run, thin
from vit_at.schema import Study, check, read_json
from vit_at.workdir.files import as_config, write_atomically
from vit_at.workdir.results import check_records

FORMAT = "vit_at study 1"
_BY_HAND: dict[str, Any] = {"commands": [], "machine": "", "notes": ""}
_MOST_POINTS = 80  # of a curve
_DAMAGED = "a damaged study file"
_AGAIN = "restore it, or write it again with 'vit-at report WORKDIR ... --out=FILE.json'"
_DIGITS = 5  # of a curve's numbers; accuracies are stored in full


def write(path: epath.Path, runs: Sequence[Run]) -> None:
    """Writes the study file of these runs, whole or not at all."""
    stored = _load(path) if path.exists() else {}
    configs = [flatten(run.config) | {"data.dir": "", "data.decoded_dir": ""} for run in runs]
    config = _shared(configs)
    by_attack: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for record in run.records:
            by_attack.setdefault(record["attack"], []).append(flatten(record["protocol"]))
    protocols = {attack: _shared(found) for attack, found in by_attack.items()}
    head = {"format": FORMAT}
    head |= {field: stored.get(field, empty) for field, empty in _BY_HAND.items()}
    head |= {"config": config, "protocols": protocols}
    lines = ",\n    ".join(
        json.dumps(_packed(run, _without(own, config), protocols))
        for run, own in zip(runs, configs, strict=True)
    )
    text = json.dumps(head, indent=2).removesuffix("\n}")
    write_atomically(path, f'{text},\n  "runs": [\n    {lines}\n  ]\n}}\n')


def read(path: epath.Path) -> list[Run]:
    """The runs of a study file, without work directories.

    Raises:
      UserError: it is not a study file, or it is damaged.
    """
    stored = check(_load(path), Study, path, _AGAIN, what=_DAMAGED)
    try:
        return [_unpacked(i, entry, stored, path) for i, entry in enumerate(stored["runs"])]
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # fields that do not nest
        raise UserError(f"{path} is {_DAMAGED} ({error!r}); {_AGAIN}") from error


def _load(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a study file or a work directory")
    stored: Any = read_json(path, Any, "restore or delete it", nan=True)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(
            f"{path} is no study file (its 'format' is not '{FORMAT}'); give one that "
            "'vit-at report WORKDIR ... --out=FILE.json' has written"
        )
    return stored


def _packed(run: Run, config: dict[str, Any], protocols: dict[str, Any]) -> dict[str, Any]:
    """A run as its line; config: the fields that are its own."""
    records = [
        record | {"protocol": _without(flatten(record["protocol"]), protocols[record["attack"]])}
        for record in run.records
    ]
    entry = {"name": run.name, "config": config, "records": records}
    return entry | ({"curves": _rounded(run.curves)} if run.curves else {})


def _unpacked(number: int, entry: dict[str, Any], stored: dict[str, Any], path: epath.Path) -> Run:
    place = f"runs[{number}]"
    config = as_config(nested(stored["config"] | entry["config"]), path, f"{place}.config")
    records = [
        record | {"protocol": nested(stored["protocols"][record["attack"]] | record["protocol"])}
        for record in entry["records"]
    ]
    check_records(records, path, _AGAIN, what=_DAMAGED, inside=f"{place}.records")
    curves = {name: (xs, ys) for name, (xs, ys) in entry.get("curves", {}).items()}
    for name, (xs, ys) in curves.items():
        if len(xs) != len(ys):
            raise ValueError(f"the curve {name} of {place} has {len(xs)} epochs, {len(ys)} values")
    return Run(entry["name"], config.to_dict(), curves, records)


def _rounded(curves: dict[str, Curve]) -> dict[str, list[list[float]]]:
    thinned = {name: thin(xs, ys, _MOST_POINTS) for name, (xs, ys) in curves.items()}
    return {
        name: [[float(f"{value:.{_DIGITS}g}") for value in values] for values in curve]
        for name, curve in sorted(thinned.items())
    }


def _shared(flat: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The fields that all have, with the same value."""
    first, *others = flat
    return {
        field: value
        for field, value in first.items()
        if all(field in other and other[field] == value for other in others)
    }


def _without(flat: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in flat.items() if field not in shared}
