"""One attack under several threats: a curve over eps, or the union over norms.

threats        the threats that --norm, --eps and --step_size ask for
attacks        what to run under each of them
store_unions   records of the worst case over norms
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_at.attacks import NORMS, Threat
from vit_at.config import evaluation_threat, validate
from vit_at.data.examples import Examples
from vit_at.errors import UserError
from vit_at.evaluation.protocol import Attack, parse_attacks, union_record
from vit_at.workdir.outcomes import union
from vit_at.workdir.results import PER_EXAMPLE_FILE, RESULTS_FILE, Results


def threats(
    config: ConfigDict, norm: str, eps: Sequence[float], step_size: float | None
) -> list[Threat]:
    """One threat; one for each eps over 0 of several; or one for each of several norms.

    The last one is left in ``config.eval.threat``. The step size is in the configuration's
    proportion to eps, unless it is given: the steps of another ball might not leave its centre.

    Raises:
      UserError: a threat that can't be, or that the options leave open.
    """
    before = evaluation_threat(config)
    norms = [name.strip().lower() for name in norm.split(",")] if norm else [before.norm]
    if unknown := [name for name in norms if name not in NORMS]:
        raise UserError(
            f"--norm is {norm}, where '{unknown[0]}' is unknown; name one of {', '.join(NORMS)}, "
            "or several with commas"
        )
    if norms != [before.norm] and not eps:
        raise UserError(
            f"--norm is {norm}, but the run is evaluated under {before.norm}, whose eps means "
            "something else; give --eps too"
        )
    if eps and not any(eps):
        raise UserError(
            "--eps is 0, which is the clean images; use --attacks=clean without --eps, or give an "
            "eps over 0, too, such as --eps=0,8/255"
        )
    if len(norms) > 1:
        pairs = _pairs(norms, eps, step_size)
    elif len(eps) > 1:
        pairs = [(norms[0], size) for size in sorted(set(eps) - {0})]
    else:
        pairs = [(norms[0], eps[0] if eps else before.eps)]
    found = []
    for name, size in pairs:
        own = config.eval.threat
        own.norm, own.eps = name, size
        scaled = before.step_size * (size / before.eps)  # exact for the configuration's own eps
        own.step_size = scaled if step_size is None else step_size
        for option, value in (("--eps", own.eps), ("--step_size", own.step_size)):
            if not value > 0:
                raise UserError(f"{option} is {value:g}; it must be over 0, such as 8/255")
        validate(config)
        found.append(Threat.of(evaluation_threat(config)))
    return found


def _pairs(
    norms: Sequence[str], eps: Sequence[float], step_size: float | None
) -> list[tuple[str, float]]:
    """(norm, eps) of a union over norms."""
    shown = ",".join(norms)
    if len(set(norms)) < len(norms):
        raise UserError(f"--norm is {shown}, which has a norm twice; name each once")
    if len(eps) != len(norms):
        raise UserError(
            f"--norm is {shown}, but --eps has {len(eps)} values; give one eps for each norm, such "
            "as --norm=linf,l2 --eps=8/255,0.5"
        )
    if step_size is not None:
        raise UserError(
            f"--step_size is {step_size:g} for the norms {shown}, whose sizes mean different "
            "things; leave it out: each step then has the configuration's proportion to eps"
        )
    return list(zip(norms, eps, strict=True))


def attacks(
    names: str, under: Sequence[Threat], restarts: int, clean: bool, precision: str = "float32"
) -> list[Attack]:
    """Each attack of ``parse_attacks`` under each threat; clean images once.

    clean: adds the clean images, where ``names`` does not have them.
    """
    parsed = (parse_attacks(names, threat, restarts, precision) for threat in under)
    each = zip(*parsed, strict=True)
    found = [a for same in each for a in (same[:1] if same[0].kind == "clean" else same)]
    if clean and not any(attack.kind == "clean" for attack in found):
        found = parse_attacks("clean", under[0], precision=precision) + found
    return found


def store_unions(
    records: Sequence[dict[str, Any]], results: Results, examples: Examples
) -> list[dict[str, Any]]:
    """Stores, for each attack, the worst case over its records; returns the new records.

    An image is correct if it is correct in each of them.

    Raises:
      UserError: the outcomes of single images are lost.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "norm" in record["protocol"]:
            groups.setdefault(record["attack"], []).append(record)
    found = []
    for parts in groups.values():
        measured = results.measured(parts)
        if len(measured) < len(parts):
            raise UserError(
                f"{results.workdir / PER_EXAMPLE_FILE} lacks the outcomes of some of the "
                f"evaluations of {parts[0]['attack']}, so their union is unknown; move "
                f"{RESULTS_FILE} away to measure them again"
            )
        correct = union(measured)
        found.append(union_record(parts, correct))
        results.add(found[-1], correct, examples)
    return found
