"""The jobs of a sweep: runs of one recipe that differ in variants and fields.

A recipe declares its sweep with a function beside ``get_config``. Each ``add`` is one job, given by
variants of the config string and by values of fields:

    def sweep(add):
        for seed in range(3):
            add("ard_prm", {"seed": seed, "threat.eps": 8 / 255})

``jobs_of`` turns that into arguments of ``vit_at.main``, with a work directory for each job.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from vit_at import configs
from vit_at.config import differences, flatten
from vit_at.errors import UserError, nearest
from vit_at.reporting.run import is_own
from vit_at.training import objectives
from vit_at.workdir.checkpoint import last_values
from vit_at.workdir.files import CONFIG_FILE, read_values
from vit_at.workdir.results import RESULTS_FILE, read_records

_FIELD_FLAG = re.compile(r"--?config\.([^=]+)")


class Job(NamedTuple):
    """One run of a sweep, to be started or finished.

    variants: as given to ``add``. arguments: of vit_at.main. free: fields that flags set; a
    finished run may differ from ``config`` in these.
    """

    name: str
    variants: str
    config: ConfigDict
    workdir: epath.Path
    arguments: list[str]
    free: frozenset[str]

    @property
    def finished(self) -> bool:
        """Whether training has ended under this configuration, and every attack was measured then.

        A run whose checkpoints were removed counts by its records.
        """
        path = self.workdir / CONFIG_FILE
        if not (path.exists() and (self.workdir / RESULTS_FILE).exists()):
            return False
        stored = read_values(path)
        changes = differences(stored, json.loads(json.dumps(self.config.to_dict())))
        changed = {change.partition(" ")[0] for change in changes}
        end = last_values(self.workdir) or {}
        wanted = {attack.strip() for attack in stored["eval"]["attacks"].split(",")}
        measured = {r["attack"] for r in read_records(self.workdir) if _is_final(r, stored, end)}
        return changed <= self.free and end.get("ended", True) and wanted <= measured


def _is_final(record: dict[str, Any], config: dict[str, Any], end: dict[str, Any]) -> bool:
    """Whether a record is of the final evaluation: its weights, images and seed.

    end: the values of the run's last checkpoint; {}: its weights are not known.
    """
    protocol, options = record["protocol"], config["eval"]
    steps = {end.get("step"), (end.get("best") or {}).get("step")}
    return (
        (not end or protocol["weights"].get("step") in steps)
        and options["num_examples"] in (0, protocol["num_examples"])
        and protocol["seed"] == config["seed"]
        and is_own(record, config["data"])
    )


def jobs_of(recipe: str, root: epath.Path | None = None, flags: Sequence[str] = ()) -> list[Job]:
    """The jobs of a recipe's sweep, in the order of its ``add`` calls.

    Args:
      recipe: 'configs/digits_sgd.py', or with variants for all jobs: '...py:smoke'.
      root: of the work directories; default: runs/<config name>-sweep.
      flags: of vit_at.main, for every job.

    Raises:
      UserError: no such recipe, no sweep in it, an unknown field or variant, or a job added twice.
    """
    source, _, common = recipe.partition(":")
    module = configs.find(source)
    if not hasattr(module, "sweep"):
        raise UserError(f"{source} declares no sweep; add a function sweep(add) beside get_config")
    runs = root or epath.Path("runs") / f"{configs.load(recipe).name}-sweep"
    added: list[tuple[str, dict[str, Any]]] = []

    def add(variants: str = "", fields: dict[str, Any] | None = None) -> None:
        added.append((variants, fields or {}))

    module.sweep(add)
    short = _shortened({field for _, fields in added for field in fields})
    jobs: list[Job] = []
    for variants, fields in added:
        # The common variants come last: smoke makes any variant small.
        both = ",".join(filter(None, (variants, common)))
        place = f"{source}:{both}".removesuffix(":")
        jobs.append(_job(place, variants, fields, runs, flags, short))
    names = [job.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{source} adds the run '{twice}' to its sweep twice; remove one")
    return jobs


def _shortened(fields: Iterable[str]) -> dict[str, str]:
    """{field: its last part}, or the whole field where two of them end alike."""
    last = {field: field.rpartition(".")[2] for field in fields}
    ends = list(last.values())
    return {field: end if ends.count(end) == 1 else field for field, end in last.items()}


def _job(
    recipe: str,
    own: str,
    fields: dict[str, Any],
    root: epath.Path,
    flags: Sequence[str],
    short: dict[str, str],
) -> Job:
    """The job of one ``add(own, fields)``; short: names of the fields, for that of the job."""
    source, config = recipe.partition(":")[0], configs.load(recipe)
    known = list(flatten(config))
    for field in fields:
        if field not in known:
            raise UserError(
                f"the sweep of {source} sets the field '{field}', which is unknown; the "
                f"nearest are {nearest(field, known)}"
            )
    free = {match[1] for match in map(_FIELD_FLAG.match, flags) if match}
    if both := sorted(free & fields.keys()):
        raise UserError(
            f"--config.{both[0]} is given for all runs, but the sweep of {source} sets it for each "
            "run; leave the flag out, or change the sweep"
        )
    with config.unlocked():
        try:
            config.update_from_flattened_dict(fields)
        except TypeError as error:
            sentence = f"the sweep of {source} sets a value of a wrong kind ({error})"
            raise UserError(sentence) from error
    objectives.check(config)
    parts = [own] + [f"{short[field]}={value}" for field, value in fields.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(filter(None, parts))).strip("_") or "default"
    arguments = [f"--config={recipe}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    arguments += [f"--workdir={root / name}", *flags]
    return Job(name, own, config, root / name, arguments, frozenset(free | {"dtype"}))
