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
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from vit_at import configs
from vit_at.config import differences, flatten
from vit_at.errors import UserError, nearest
from vit_at.training import objectives
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
        """Whether every attack has been measured under this configuration."""
        path = self.workdir / CONFIG_FILE
        if not (path.exists() and (self.workdir / RESULTS_FILE).exists()):
            return False
        stored = read_values(path)
        changes = differences(stored, json.loads(json.dumps(self.config.to_dict())))
        changed = {change.partition(" ")[0] for change in changes}
        wanted = {attack.strip() for attack in stored["eval"]["attacks"].split(",")}
        measured = {record["attack"] for record in read_records(self.workdir)}
        return changed <= self.free and wanted <= measured


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
    jobs: list[Job] = []

    def add(variants: str = "", fields: dict[str, Any] | None = None) -> None:
        # The common variants come last: smoke makes any variant small.
        both = ",".join(filter(None, (variants, common)))
        jobs.append(_job(f"{source}:{both}".removesuffix(":"), variants, fields or {}, runs, flags))

    module.sweep(add)
    names = [job.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{source} adds the run '{twice}' to its sweep twice; remove one")
    return jobs


def _job(
    recipe: str, own: str, fields: dict[str, Any], root: epath.Path, flags: Sequence[str]
) -> Job:
    """The job of one ``add(own, fields)``."""
    source, config = recipe.partition(":")[0], configs.load(recipe)
    known = list(flatten(config))
    for field in fields:
        if field not in known:
            raise UserError(
                f"the sweep of {source} sets the field '{field}', which is unknown; the "
                f"nearest are {nearest(field, known)}"
            )
    with config.unlocked():
        try:
            config.update_from_flattened_dict(fields)
        except TypeError as error:
            sentence = f"the sweep of {source} sets a value of a wrong kind ({error})"
            raise UserError(sentence) from error
    objectives.check(config)
    parts = [own] + [f"{field.rpartition('.')[2]}={v}" for field, v in fields.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(filter(None, parts))).strip("_") or "default"
    arguments = [f"--config={recipe}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    arguments += [f"--workdir={root / name}", *flags]
    free = {match[1] for match in map(_FIELD_FLAG.match, flags) if match} | {"dtype"}
    return Job(name, own, config, root / name, arguments, frozenset(free))
