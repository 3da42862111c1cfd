"""Runs compared: grouped over seeds, named by their differences, with mean accuracies.

find     the runs of work directories and study files
groups   runs that differ only in the seed, named by what tells them from the other groups
compare  the groups' accuracies, mean and standard deviation over the seeds, as a Table
"""

import collections
import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from vit_at.config import flatten
from vit_at.reporting import study_file
from vit_at.reporting.run import Run
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir import registry
from vit_at.workdir.files import CONFIG_FILE, is_export, is_workdir
from vit_at.workdir.results import AUTOATTACK, in_255ths

# Fields that do not change what is trained: names, places, and how often the run is measured.
_IRRELEVANT = frozenset({"name", "seed", "log_every_steps"})
_IRRELEVANT |= {"data.dir", "data.cache_gib", "data.decoded_dir", "data.threads"}
_IRRELEVANT |= {"eval.attacks", "eval.batch_size", "eval.num_examples"}
_IRRELEVANT |= {"checkpoint.every_minutes", "checkpoint.keep"}
# Fields that training without masks, and natural training, do not use.
_OF_THE_MASKS = frozenset({"masking.keep_max", "masking.patch_size", "masking.warmup_epochs"})
_OF_THE_ATTACK = frozenset({"beta", "threat.eps_warmup_epochs", "threat.start", "threat.steps"})
_MOST_DIFFERENCES = 4  # in a group's name


def find(places: Sequence[str | epath.Path]) -> list[Run]:
    """The runs of these places: see ``registry.place``, directories of runs, or study files.

    Raises:
      UserError: a place holds no run, or a damaged one.
    """
    runs: list[Run] = []
    for source in dict.fromkeys(str(place).rstrip("/") for place in places):
        if epath.Path(source).suffix == ".json":
            runs += study_file.read(epath.Path(source))
            continue
        place = registry.place(source)
        own = is_workdir(place) or is_export(place)
        inner = [] if own else [path.parent for path in place.glob(f"*/{CONFIG_FILE}")]
        inner = [path for path in inner if is_workdir(path)]
        runs += [Run.read(workdir) for workdir in sorted(inner, key=_by_numbers) or [place]]
    return runs


def _by_numbers(path: epath.Path) -> list[str | float]:
    """Sorts names with their numbers by value: 'epochs=5' before 'epochs=10'."""
    words = re.split(r"(\d+(?:\.\d+)?)", path.name)
    return [float(word) if i % 2 else word for i, word in enumerate(words)]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed; name: what tells them from the other groups."""

    name: str
    runs: tuple[Run, ...]

    @property
    def natural(self) -> bool:
        """Whether these runs are trained without an attack."""
        return not OBJECTIVES[self.runs[0].config["objective"]].attack

    @property
    def drawn(self) -> Run | None:
        """The run whose curves a page draws: the first that has any."""
        return next((run for run in self.runs if run.curves), None)

    @property
    def curved(self) -> Run:
        """The first run with curves over eps, else the first run."""
        return next((run for run in self.runs if run.eps_curves()), self.runs[0])


def groups(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by their configuration without the seed, in the order of each group's first.

    Runs of one seed, such as a run and its export, are no two seeds: they get groups of their own.
    """
    gathered: dict[tuple[str, int], list[Run]] = {}
    seen: collections.Counter[tuple[str, int]] = collections.Counter()
    for run in runs:
        relevant, seed = json.dumps(_relevant(run), sort_keys=True), run.config["seed"]
        gathered.setdefault((relevant, seen[relevant, seed]), []).append(run)
        seen[relevant, seed] += 1
    flat = [_relevant(members[0]) for members in gathered.values()]
    fields = dict.fromkeys(field for config in flat for field in config)
    differing = [f for f in fields if len({json.dumps(c[f]) for c in flat if f in c}) > 1]
    names = [
        _name(config, differing, members[0])
        for config, members in zip(flat, gathered.values(), strict=True)
    ]
    return [
        Group(name if names.count(name) == 1 else f"{name} ({members[0].name})", tuple(members))
        for name, members in zip(names, gathered.values(), strict=True)
    ]


def _relevant(run: Run) -> dict[str, Any]:
    flat = flatten(run.config)
    # Each seed may start from its own pre-trained weights.
    flat["model.pretrained"] = re.sub(r"(seed\D?)\d+", r"\1*", flat["model.pretrained"])
    without = _IRRELEVANT
    if not OBJECTIVES[flat["objective"]].attack:
        without |= _OF_THE_ATTACK | _OF_THE_MASKS
    if not (flat["masking.ard"] or flat["masking.prm"]):
        without |= _OF_THE_MASKS
    return {field: value for field, value in flat.items() if field not in without}


def _name(config: dict[str, Any], differing: Sequence[str], run: Run) -> str:
    """'AT + ARD + PRM' or 'TRADES, learning_rate 0.01': the method, then what else differs.

    If more than four fields differ, they are replaced by the run's name without its seed.
    """
    said = ("objective", "masking.ard", "masking.prm")
    rest = [field for field in differing if field in config and field not in said]
    if len(rest) > _MOST_DIFFERENCES:
        arm = re.sub(r"[-_]?seed\W?\d+", "", run.name)
        return f"{method(config)} ({arm})" if arm else method(config)
    return ", ".join([method(config), *(describe(field, config[field]) for field in rest)])


def method(config: dict[str, Any]) -> str:
    """'natural', 'AT', 'TRADES + PRM', ... of a flat configuration."""
    label = OBJECTIVES[config["objective"]].label
    masks = [word.upper() for word in ("ard", "prm") if config[f"masking.{word}"]]
    return " + ".join([label, *masks])


def describe(field: str, value: Any) -> str:
    """A field and its value in words: 'schedule cosine', 'no weight_decay', 'from scratch'."""
    if field == "model.pretrained":
        return f"from {value.rstrip('/').rpartition('/')[2]}" if value else "from scratch"
    if field == "model.name":
        return value
    word = field if field.endswith(".name") else field.rpartition(".")[2]
    if word == "probability":
        word = field.rpartition(".")[0]
    if isinstance(value, (bool, int, float)) and not value:
        return f"no {word}"
    if isinstance(value, bool):
        return word
    return f"{word} {value:g}" if isinstance(value, (int, float)) else f"{word} {value}"


def attack_name(attack: str) -> str:
    """'pgd-20' -> 'PGD-20', 'autoattack' -> 'AutoAttack', 'pgd-20-union' -> 'PGD-20 union'."""
    if attack == "clean":
        return attack
    name = attack.removesuffix("-union").upper().replace(AUTOATTACK.upper(), "AutoAttack")
    return f"{name} union" if attack.endswith("-union") else name


@dataclasses.dataclass(frozen=True)
class Column:
    """An attack with its protocol; accuracies of different columns must not be averaged."""

    attack: str
    data: str
    num_examples: int
    norm: str | None
    eps: float | None
    step_size: float | None
    restarts: int | None
    union: str | None
    transform: str
    ids: str | None
    precision: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Column":
        usual = {"attack": record["attack"], "transform": "squash", "precision": "float32"}
        fields = usual | record["protocol"]
        own: dict[str, Any] = {f.name: fields.get(f.name) for f in dataclasses.fields(cls)}
        for name in ("eps", "step_size"):
            own[name] = own[name] and round(own[name], 9)
        if own["union"]:
            own["union"] = " and ".join(
                f"{part['norm']} {in_255ths(part['eps'])}" for part in own["union"]
            )
        return cls(**own)

    def heading(self, others: Sequence["Column"]) -> str:
        """The attack, with what of its protocol differs from the same attack in other columns."""
        parts = [attack_name(self.attack)]
        same = [other for other in others if other.attack == self.attack]
        words = {
            "norm": self.norm,
            "eps": f"eps {in_255ths(self.eps)}" if self.eps else "",
            "step_size": f"step {in_255ths(self.step_size)}" if self.step_size else "",
            "restarts": f"{self.restarts} restarts",
            "num_examples": f"{self.num_examples} images",
            "data": self.data,
            "union": self.union,
            "transform": self.transform,
            "ids": f"images of {self.ids}" if self.ids else "all images",
            "precision": self.precision,
        }
        differing = [w for f, w in words.items() if len({getattr(o, f) for o in same}) > 1]
        return ", ".join(parts + [word for word in differing if word])


@dataclasses.dataclass(frozen=True)
class Table:
    """headings of the columns; rows: (name, number of seeds, a cell each, '-' if not measured)."""

    headings: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, int, tuple[str, ...]], ...]

    def markdown(self) -> str:
        """As a GitHub table."""
        lines = [["training", "seeds", *(f"{heading} %" for heading in self.headings)]]
        lines += [["---"] * len(lines[0])]
        lines += [[n.replace("|", r"\|"), str(seeds), *cells] for n, seeds, cells in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def compare(members: Sequence[Group]) -> Table:
    """Accuracies in per cent: mean ± standard deviation over the seeds of each group."""
    measured = [accuracies(group) for group in members]
    columns = sorted({column: None for found in measured for column in found}, key=_order)
    headings = tuple(column.heading(columns) for column in columns)
    rows = [
        (group.name, len(group.runs), tuple(_cell(found.get(c, []), group) for c in columns))
        for group, found in zip(members, measured, strict=True)
    ]
    return Table(headings, tuple(columns), tuple(rows))


def _cell(values: Sequence[float], group: Group) -> str:
    text = mean_and_deviation(values)
    return text if len(values) in (0, len(group.runs)) else f"{text} ({len(values)} seeds)"


def accuracies(group: Group) -> dict[Column, list[float]]:
    """{column: a value for each run that was measured under its protocol}.

    Of a run's evaluations with several seeds of the attack, that with the run's own seed.
    """
    found: dict[Column, list[float]] = {}
    for run in group.runs:
        own_last = sorted(run.main, key=lambda r: r["protocol"].get("seed") == run.config["seed"])
        for column, record in {Column.of(record): record for record in own_last}.items():
            found.setdefault(column, []).append(record["accuracy"])
    return found


def _order(column: Column) -> tuple[Any, ...]:
    """Clean first, then by attack and strength; AutoAttack last."""
    rank = 2 if column.attack.startswith(AUTOATTACK) else int(column.attack != "clean")
    kind, _, steps = column.attack.partition("-")
    strength = int(steps) if steps.isdecimal() else 0
    return rank, kind, strength, column.eps or 0, column.step_size or 0, -column.num_examples


def mean_and_deviation(values: Sequence[float]) -> str:
    """[0.7, 0.8] -> '75.0 ± 7.1': per cent, the sample standard deviation; '-' for none."""
    if not values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
