"""Transfer: the accuracy of models on adversarial images that were made for other models.

Every model is attacked by PGD or CW, as in ``evaluator``, and every model classifies all these
images. On its own images a model has the accuracy of the white-box attack.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vit_at.attacks.losses import is_correct
from vit_at.console import Progress
from vit_at.data import augment
from vit_at.data.examples import Examples
from vit_at.distributed import processes, sharding
from vit_at.errors import UserError
from vit_at.evaluation.evaluator import by_parts, global_batches, perturb
from vit_at.evaluation.protocol import Attack, record, weights_digest
from vit_at.evaluation.subject import Subject, of_directory
from vit_at.workdir.results import Results

TRANSFER_DIRECTORY = "transfer"  # of results, in a work directory
_KINDS = ("pgd", "cw")
_OF_A_PAIR = ("weights", "transfer", "packages")  # in the protocol of a record


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Accuracy [sources, targets] of an attack, and its standard error; both axes have ``names``.

    protocol: what all its records share of theirs.
    """

    attack: str
    names: tuple[str, ...]
    accuracy: np.ndarray
    standard_error: np.ndarray
    protocol: dict[str, Any]


def subjects(
    subject: Subject, places: str, checkpoint: str, attacks: Sequence[Attack], data: str = ""
) -> dict[str, Subject]:
    """The subject and the models of ``places`` by name, the last part of their directories.

    Args:
      places: work directories or exports, comma-separated; checkpoint: of these.
      attacks: what will be run.
      data: a data set that takes the place of that of the models.

    Raises:
      UserError: one can't be read, takes other images or has other classes, or an attack does not
        suit.
    """
    _check_attacks(attacks)
    directories = [place.strip() for place in places.split(",")]
    if "" in directories:
        raise UserError(
            f"--from is '{places}', where a directory is missing; write --from=RUN2,RUN3"
        )
    names = [str(place).rstrip("/") for place in (subject.workdir, *directories)]
    short = [name.rpartition("/")[2] for name in names]
    names = short if len(set(short)) == len(short) else names
    if len(set(names)) < len(names):
        raise UserError(f"--from is '{places}', so a model is there twice; name each once")
    found = {names[0]: subject}
    for name, directory in zip(names[1:], directories, strict=True):
        found[name] = other = of_directory(directory, checkpoint, of_others=True)
        other.config.data.name = data or other.config.data.name
        _check_inputs(names[0], subject, name, other)
    return found


def _check_attacks(attacks: Sequence[Attack]) -> None:
    for attack in attacks:
        if attack.kind not in (*_KINDS, "clean"):
            raise UserError(
                f"attack '{attack.name}' is given with --from, which takes pgd-N and cw-N only; "
                "leave it out"
            )
    if all(attack.kind == "clean" for attack in attacks):
        raise UserError("--from is given without an attack; add one, such as --attacks=pgd-20")
    if len({(attack.threat.norm, attack.threat.eps) for attack in attacks}) > 1:
        raise UserError("--from is given with several eps or norms; give one eps and one norm")


def _check_inputs(name: str, one: Subject, other_name: str, other: Subject) -> None:
    """Checks that two models take the same images and have the same classes."""
    shapes = [
        (s.config.data.image_size, s.config.data.image_size, len(s.config.data.mean))
        for s in (one, other)
    ]
    compared = {
        "data set": (one.config.data.name, other.config.data.name),
        "image shape": tuple(shapes),
        "number of classes": (one.num_classes, other.num_classes),
    }
    if one.class_names and other.class_names:
        compared["list of classes"] = (one.class_names, other.class_names)
    for what, (ours, theirs) in compared.items():
        if ours != theirs:
            raise UserError(
                f"the {what} of {name} is {_shown(ours)}, but that of {other_name} is "
                f"{_shown(theirs)}; for --from, choose models of the same data"
            )


def _shown(value: Any) -> str:
    return f"{value}"[:60]


def evaluate_transfer(
    models: Mapping[str, Subject],
    examples: Examples,
    attacks: Sequence[Attack],
    mesh: Mesh,
    results: Results,
    *,
    batch_size: int,
    seed: int,
    threads: int = 0,
) -> list[dict[str, Any]]:
    """Attacks each model and measures all on the images; stores a record for each pair.

    Pairs that are stored are not measured again.

    Args:
      models: by name, see ``subjects``.
      attacks: of pgd and cw; clean ones are left out.

    Returns:
      The records: for each attack and source, one for each target.
    """
    about = {n: {"digest": weights_digest(s.params), **s.weights} for n, s in models.items()}
    params = {n: sharding.replicate(s.params, mesh) for n, s in models.items()}
    wrong, records = np.zeros(len(examples), bool), []

    def entry(attack, source, target, correct):
        options = {"examples": examples, "seed": seed, "weights": about[target]}
        found = record(attack, correct, **options)
        pair = {"source": source, "digest": about[source]["digest"], "target": target}
        return found | {"protocol": found["protocol"] | {"transfer": pair}}

    judges = {n: _correct_fn(s.apply, attacks[0], mesh) for n, s in models.items()}
    for attack in (a for a in attacks if a.kind != "clean"):
        for source, subject in models.items():
            stored = [results.find(entry(attack, source, target, wrong)) for target in models]
            if not processes.agree(None not in stored):
                attacked = _attacked_fn(subject.apply, attack, mesh, seed)
                batches = global_batches(examples, batch_size, mesh, threads)
                correct = {name: wrong.copy() for name in models}
                bar = Progress(-(-len(examples) // batch_size), 0, "batches")
                for where, real, batch in batches:
                    images = attacked(params[source], batch)
                    for name, judge in judges.items():
                        rows = sharding.my_rows(judge(params[name], batch | {"image": images}))
                        correct[name][where[real]] = rows[real]
                    bar.update(f"{attack.name} on {source}")
                bar.close()
                stored = []
                for name, found in correct.items():
                    found = processes.any_of(found)
                    stored.append(entry(attack, source, name, found))
                    results.add(stored[-1], found, examples)
            records += stored
    return records


def _attacked_fn(
    apply: Callable[..., jax.Array], attack: Attack, mesh: Mesh, seed: int
) -> Callable[..., jax.Array]:
    """A compiled (params, batch) -> adversarial images [B, H, W, C] in [0, 1]."""

    def of_part(logits_fn, part, threat):
        images = augment.to_float(part["image"])
        return perturb(logits_fn, images, part, attack, threat, seed)

    return by_parts(apply, of_part, mesh, attack)


def _correct_fn(
    apply: Callable[..., jax.Array], attack: Attack, mesh: Mesh
) -> Callable[..., jax.Array]:
    """A compiled (params, batch of images in [0, 1]) -> correct [B] bool, in its precision."""

    def of_part(logits_fn, part, _):
        return is_correct(logits_fn(part["image"]), part["label"])

    return by_parts(apply, of_part, mesh, attack)


def matrices(records: Sequence[dict[str, Any]]) -> list[Matrix]:
    """The matrices of records of transfer: one for each attack and threat, of all its models.

    A pair that was not measured is NaN.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in records:
        shared = {k: v for k, v in entry["protocol"].items() if k not in _OF_A_PAIR}
        groups.setdefault(repr((entry["attack"], sorted(shared.items()))), []).append(entry)
    return [_matrix(entries) for entries in groups.values()]


def _matrix(entries: Sequence[dict[str, Any]]) -> Matrix:
    pairs = [entry["protocol"]["transfer"] for entry in entries]
    names = tuple(dict.fromkeys(pair[end] for pair in pairs for end in ("source", "target")))
    accuracy = np.full((len(names), len(names)), np.nan)
    error = accuracy.copy()
    for entry, pair in zip(entries, pairs, strict=True):
        place = names.index(pair["source"]), names.index(pair["target"])
        accuracy[place], error[place] = entry["accuracy"], entry["standard_error"]
    protocol = {k: v for k, v in entries[0]["protocol"].items() if k not in _OF_A_PAIR}
    return Matrix(entries[0]["attack"], names, accuracy, error, protocol)
