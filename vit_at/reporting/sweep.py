"""Sweeps: many runs of one recipe, and the one table of what they reached.

A recipe declares its sweep beside ``get_config``; each ``add`` is one run, given by variants of the
config string and by values of fields:

    def sweep(add):
        for seed in range(3):
            add("ard_prm", {"seed": seed, "threat.eps": 8 / 255})

``runs_of`` turns that into commands of ``vit_at.main``, each with a work directory of its own under
one root; ``collect`` reads what the finished ones have measured. ``launch/sweep.py`` starts them.
"""

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from vit_at.config import differences, field_names, with_added
from vit_at.errors import UserError, nearest
from vit_at.reporting import study
from vit_at.training import objectives
from vit_at.workdir.files import CONFIG_FILE, read_json, write_atomically
from vit_at.workdir.results import RESULTS_FILE

TABLE_FILE = "table.md"  # in the root of the runs
_FIELD_FLAG = re.compile(r"--?config\.([^=]+)")


class Run(NamedTuple):
    """One run of a sweep.

    variants and fields: as given to ``add``; arguments: of vit_at.main; free: the fields that flags
    have set, so that a finished run may have them otherwise than ``config``.
    """

    name: str
    variants: str
    fields: dict[str, Any]
    config: ConfigDict
    workdir: epath.Path
    arguments: list[str]
    free: frozenset[str]

    @property
    def accuracies(self) -> dict[str, float]:
        """{attack: accuracy} as far as they have been measured."""
        path = self.workdir / RESULTS_FILE
        records = read_json(path) if path.exists() else []
        return {record["attack"]: record["accuracy"] for record in records}

    @property
    def finished(self) -> bool:
        """Whether every attack of this very configuration has been measured."""
        path = self.workdir / CONFIG_FILE
        if not path.exists():
            return False
        stored = read_json(path)
        changes = differences(with_added(stored), json.loads(json.dumps(self.config.to_dict())))
        changed = {change.partition(" ")[0] for change in changes}
        wanted = {attack.strip() for attack in stored["eval"]["attacks"].split(",")}
        return changed <= self.free and wanted <= self.accuracies.keys()


def runs_of(recipe: str, root: epath.Path | None = None, flags: Sequence[str] = ()) -> list[Run]:
    """The runs of a recipe's sweep, in the order of its ``add`` calls.

    Args:
      recipe: 'configs/digits_sgd.py', or with variants that all runs take: '...py:smoke'.
      root: of the work directories; default: runs/<config name>-sweep.
      flags: of vit_at.main, for every run.

    Raises:
      UserError: no such recipe, no sweep in it, an unknown field or variant, or a run twice.
    """
    file, _, common = recipe.partition(":")
    module = _load(file)
    if not hasattr(module, "sweep"):
        raise UserError(f"{file} declares no sweep; add a function sweep(add) beside get_config")
    entries: list[tuple[str, dict[str, Any]]] = []

    def add(variants: str = "", fields: dict[str, Any] | None = None) -> None:
        entries.append((variants, dict(fields or {})))

    module.sweep(add)
    root = root or epath.Path("runs") / f"{_config(module, file, common).name}-sweep"
    runs = [_run(module, file, common, root, flags, *entry) for entry in entries]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file} adds the run '{twice}' to its sweep twice; remove one")
    return runs


def load_recipe(recipe: str) -> ConfigDict:
    """The configuration of 'FILE.py' or 'FILE.py:variants'; UserError where that fails."""
    file, _, variants = recipe.partition(":")
    return _config(_load(file), file, variants)


def _load(file: str) -> Any:
    """The module of a recipe."""
    try:
        spec = importlib.util.spec_from_file_location("recipe", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # a recipe is a program: it can raise anything
        raise UserError(
            f"the recipe '{file}' can't be loaded ({error}); give a file such as "
            "configs/digits_sgd.py, and run the command where that lies"
        ) from error
    return module


def _config(module: Any, file: str, variants: str) -> ConfigDict:
    try:
        return module.get_config(variants) if variants else module.get_config()
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}:{variants} can't be loaded ({error})") from error


def _run(
    module: Any,
    file: str,
    common: str,
    root: epath.Path,
    flags: Sequence[str],
    variants: str,
    fields: dict[str, Any],
) -> Run:
    # The common variants last: smoke makes anything small.
    both = ",".join(filter(None, (variants, common)))
    config = _config(module, file, both)
    known = list(field_names(config))
    for field in fields:
        if field not in known:
            raise UserError(
                f"the sweep of {file} sets the field '{field}', which is unknown; the nearest are "
                f"{nearest(field, known)}"
            )
    with config.unlocked():
        try:
            config.update_from_flattened_dict(fields)
        except TypeError as error:
            raise UserError(
                f"the sweep of {file} sets a value of a wrong kind ({error})"
            ) from error
    objectives.check(config)
    parts = [variants] + [f"{field.rpartition('.')[2]}={v}" for field, v in fields.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(filter(None, parts))).strip("_") or "default"
    arguments = [f"--config={file}:{both}" if both else f"--config={file}"]
    arguments += [f"--config.{field}={value}" for field, value in fields.items()]
    arguments += [f"--workdir={root / name}", *flags]
    free = {match[1] for match in map(_FIELD_FLAG.match, flags) if match} | {"dtype"}
    return Run(name, variants, fields, config, root / name, arguments, frozenset(free))


def collect(runs: list[Run], root: epath.Path) -> str:
    """Writes ``study.table`` of the finished runs into root, as ``table.md``; returns its text."""
    done = [study.Run.read(run.workdir) for run in runs if run.finished]
    text = study.table(study.groups(done)).markdown() if done else "no run has finished\n"
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / TABLE_FILE, text)
    return text
