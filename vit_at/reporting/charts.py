"""The sections of a report: charts and pictures with their notes.

training, by_attack, compared, audit_curves    from configurations, curves and records
attacked, curves, masks, by_class              from what ``exhibits`` computes from the weights
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_at.reporting import pictures
from vit_at.reporting.exhibits import Attacked, Exhibits
from vit_at.reporting.run import Curve, Run
from vit_at.reporting.study import Column, Group, Table, accuracies, attack_name, groups
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir.outcomes import threats
from vit_at.workdir.results import Results, in_255ths

_MOST_CLASSES = 20  # drawn; if there are more, the best and the worst
_PIXELS = 96  # smaller images are enlarged to at least this side


@dataclasses.dataclass(frozen=True)
class Section:
    """title, note: text. charts: SVG. cards: (heading, images as (caption, data URI))."""

    title: str
    note: str = ""
    charts: tuple[str, ...] = ()
    cards: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


# Metric and title of a chart over epochs. The chart of accuracies has several metrics.
_ACCURACIES = {"training, adversarial": "accuracy_adv", "training, clean": "accuracy_clean"}
_CURVES = (
    ("loss", "Training loss"),
    ("learning_rate", "Learning rate"),
    ("gradient_norm", "Gradient norm (before clipping)"),
    ("keep_probability", "Keep probability of ARD and PRM"),
    ("eps", "eps of the training attack"),
)


def training(runs: Mapping[str, Run], title: str = "Training") -> Section:
    """Curves over epochs: of one run, or of several by name in the same charts."""
    charts = _accuracies(*runs.values()) if len(runs) == 1 else _compared_accuracies(runs)
    for metric, name_of_chart in _CURVES:
        lines = {name: run.series(metric) for name, run in runs.items()}
        if metric == "eps":
            for name, run in runs.items():
                if not OBJECTIVES[run.config["objective"]].attack:
                    lines[name] = ([], [])
            if all(len(set(values)) <= 1 for _, values in lines.values()):
                continue
        charts += _over_epochs(name_of_chart, lines)
    note = "Each point of a long curve is the mean of its neighbours. "
    if any(_validation_attack(run) for run in runs.values()):
        note += "Validation is on held-out training images."
    return Section(title, note, tuple(charts))


def _over_epochs(title: str, lines: Mapping[str, Curve], percent: bool = False) -> list[str]:
    """One chart; none if there is nothing to draw. A run keeps its colour in all charts."""
    if not any(epochs for epochs, _ in lines.values()):
        return []
    return [pictures.line_chart(title, lines, x="epoch", percent=percent).svg()]


def with_drawn_curves(runs: Sequence[Run]) -> list[Run]:
    """The runs with only those curves that their page draws: of one run in each group."""
    drawn = [group.drawn for group in groups(runs)]
    metrics = {*_ACCURACIES.values(), *(metric for metric, _ in _CURVES)}

    def curves(run):
        kept = (n for n in run.curves if n in metrics or n.startswith("validation/"))
        return {name: run.curves[name] for name in kept} if run in drawn else {}

    return [dataclasses.replace(run, curves=curves(run)) for run in runs]


def _validation_attack(run: Run) -> str | None:
    """The metric of robust validation, such as 'validation/pgd-10'."""
    names = {name for name in run.curves if name.startswith("validation/")}
    return min(names - {"validation/clean"}, default=None)


def _accuracies(run: Run) -> list[str]:
    wanted = _ACCURACIES | {"validation, clean": "validation/clean"}
    if attack := _validation_attack(run):
        wanted[f"validation, {attack.removeprefix('validation/').upper()}"] = attack
    lines = {name: run.series(metric) for name, metric in wanted.items() if metric in run.curves}
    return _over_epochs("Accuracy", lines, percent=True)


def _compared_accuracies(runs: Mapping[str, Run]) -> list[str]:
    clean = {name: run.series("validation/clean") for name, run in runs.items()}
    robust = {name: run.series(_validation_attack(run) or "") for name, run in runs.items()}
    return [
        *_over_epochs("Validation accuracy, clean", clean, percent=True),
        *_over_epochs("Validation accuracy under attack", robust, percent=True),
    ]


def by_attack(records: Sequence[dict[str, Any]]) -> Section:
    """Bars of the accuracy under each attack, and after each attack of AutoAttack's cascade."""
    bars = {_with_eps(record): {"": [record["accuracy"]]} for record in records}
    errors = {_with_eps(record): record["standard_error"] for record in records}
    charts = [pictures.bar_chart("", bars, errors).svg()]
    for record in records:
        if "cascade" in record:
            cascade = {name: {"": [value]} for name, value in record["cascade"].items()}
            chart = pictures.bar_chart("After each attack of AutoAttack", cascade)
            charts.append(chart.svg())
    note = "Whiskers are one standard error, of a share of independent images."
    return Section("Accuracy by attack", note, tuple(charts))


def _with_eps(record: dict[str, Any]) -> str:
    sizes = [f"{t['norm']} {in_255ths(t['eps'])}" for t in threats(record["protocol"])]
    return ", ".join([attack_name(record["attack"]), *sizes])


def common_columns(members: Sequence[Group], table: Table) -> list[Column]:
    """The columns with a value for every group, the one of the lowest mean first."""
    measured = [accuracies(group) for group in members]
    common = [c for c in table.columns if all(c in found for found in measured)]
    return sorted(common, key=lambda c: np.mean([np.mean(found[c]) for found in measured]))


def compared(members: Sequence[Group], table: Table) -> Section | None:
    """Bars of each group: clean, and under the strongest attack that all were tested with."""
    measured = [accuracies(group) for group in members]
    common = common_columns(members, table)
    clean = [column for column in common if column.attack == "clean"]
    shown = clean[:1] + [column for column in common if column.attack != "clean"][:1]
    if not shown:
        return None
    bars = {
        group.name: {attack_name(column.attack): found[column] for column in shown}
        for group, found in zip(members, measured, strict=True)
    }
    note = "Bars are means; with several seeds, each is a circle."
    return Section("Side by side", note, (pictures.bar_chart("", bars).svg(),))


def audit_curves(record: dict[str, Any]) -> Section:
    """The two curves that the audit of an AutoAttack evaluation has stored."""
    audit = record["audit"]
    by_eps, by_steps = dict(audit["eps_curve"]), dict(audit["steps_curve"])
    note = "Measured with APGD-CE on the first test images, as a check of the evaluation."
    return _curves("Accuracy over eps and steps (audit)", note, by_eps, by_steps)


def curves(exhibits: Exhibits) -> Section:
    """Accuracy over eps and over attack steps, measured for this page."""
    by_eps, by_steps, count = exhibits.curves()
    threat = exhibits.threat
    note = (
        f"The first {count} test images, attacked by PGD: {threat.steps} steps over eps, with the "
        f"step size in proportion; eps {in_255ths(threat.eps)} over steps. If the accuracy does "
        "not fall to 0 at large eps, or rises with more steps, the attack fails."
    )
    return _curves("Accuracy over eps and steps", note, by_eps, by_steps, count)


def _curves(title, note, by_eps, by_steps, count=0) -> Section:
    """count: of images, for the standard errors; 0: not drawn."""
    charts = []
    for name, found, axis in (
        ("Over eps", by_eps, "eps"),
        ("Over attack steps", by_steps, "steps"),
    ):
        shares = np.array(list(found.values()))
        errors = {"": np.sqrt(shares * (1 - shares) / count)} if count else None
        look: dict[str, Any] = {"eps": True} if axis == "eps" else {"log": True}
        look |= {"percent": True, "marked": True, "errors": errors}
        charts.append(pictures.line_chart(name, {"": (list(found), shares)}, x=axis, **look).svg())
    return Section(title, note, tuple(charts))


def by_class(found: Mapping[str, Mapping[str, float]]) -> Section:
    """Bars of each class's accuracy: clean, and under the strongest attack measured."""
    attacks = list(dict.fromkeys(attack for bars in found.values() for attack in bars))
    hardest = min(
        (a for a in attacks if a != "clean"),
        key=lambda a: np.mean([bars[a] for bars in found.values() if a in bars]),
        default=None,
    )
    shown = [attack for attack in ("clean", hardest) if attack in attacks]
    bars = {
        name: {attack_name(a): [of[a]] for a in shown if a in of}
        for name, of in found.items()
        if of
    }
    note = ""
    if len(bars) > _MOST_CLASSES:
        ranked = sorted(bars, key=lambda name: bars[name].get(attack_name(shown[-1]), [0]))
        half = _MOST_CLASSES // 2
        bars = {name: bars[name] for name in ranked[:half] + ranked[-half:]}
        note = f"The {half} least robust and the {half} most robust of {len(ranked)} classes."
    return Section("Accuracy by class", note, (pictures.bar_chart("", bars).svg(),))


def attacked(shown: Attacked, class_names: Sequence[str], exhibits: Exhibits) -> Section:
    """Each test image clean and attacked, its perturbation, and where the model looks."""
    scale = -(-_PIXELS // shown.images.shape[1])
    factor = 0.5 / max(float(np.abs(shown.adversarial - shown.images).max()), 1e-12)
    cards = []
    for i, label in enumerate(shown.labels):
        clean, adversarial = shown.images[i], shown.adversarial[i]
        images = [
            (_saw(shown.clean_probabilities[i], label, class_names), clean),
            (_saw(shown.adversarial_probabilities[i], label, class_names), adversarial),
            (f"perturbation, {factor:.0f} times", 0.5 + factor * (adversarial - clean)),
        ]
        if shown.rollout is not None:
            before, after = shown.rollout
            images.append(("attention, clean", pictures.heat(before[i], clean)))
            images.append(("attention, attacked", pictures.heat(after[i], adversarial)))
        uris = tuple((caption, pictures.png(pixels, scale)) for caption, pixels in images)
        cards.append((f"labelled “{class_names[label]}”", uris))
    threat = exhibits.threat
    note = (
        f"The first {len(cards)} test images under PGD-{threat.steps} with {threat.norm} eps "
        f"{in_255ths(threat.eps)}, each with the predicted class and its probability. In the "
        "perturbation, grey is no change. "
    )
    if shown.rollout is None:
        note += "Attention is not drawn, as this architecture attends only within windows."
    else:
        note += "Attention is the rollout over all blocks; yellow is highest."
    return Section("Attacked images", note, cards=tuple(cards))


def _saw(probabilities: np.ndarray, label: int, class_names: Sequence[str]) -> str:
    seen = int(probabilities.argmax())
    mark = "✓" if seen == label else "✗"
    return f"{mark} {class_names[seen]}, {probabilities[seen]:.0%}"


def masks(exhibits: Exhibits) -> Section | None:
    """What ARD and PRM mask in one training attack; None if both are off."""
    found = exhibits.masks()
    if found is None:
        return None
    image, draws, epoch = found
    scale = -(-_PIXELS // image.shape[0])
    images = []
    for step in range(len(next(d for d in draws[1:] if d is not None))):
        patches = draws.patch_keep
        keep = np.ones((1, 1), bool) if patches is None else patches[step]
        caption = f"step {step + 1}"
        if draws.attn_keep is not None:
            caption += " " + "".join("●" if kept else "○" for kept in draws.attn_keep[step])
        images.append((caption, pictures.png(pictures.masked(image, keep), scale)))
    note = f"One training attack at epoch {epoch:g}, half way through the warm-up. "
    if draws.patch_keep is not None:
        note += "PRM: the perturbation of the marked patches is zero in this step. "
    if draws.attn_keep is not None:
        note += "ARD: a circle for each block; ● passes the gradient of its attention, ○ does not."
    return Section("What ARD and PRM mask", note, cards=(("", tuple(images)),))


def of_model(exhibits: Exhibits, run: Run, results: Results) -> list[Section]:
    """The sections that need the weights."""
    names = exhibits.class_names
    found = exhibits.by_class(results, run.tested)
    sections = [
        by_class(found) if found else None,
        curves(exhibits) if exhibits.affordable else None,
        attacked(exhibits.attacked(), names, exhibits),
        masks(exhibits),
    ]
    return [section for section in sections if section is not None]
