"""The sections of a report: which charts and pictures are drawn of a run, and what is said of them.

training, by_attack, audit_curves    from what a work directory holds
attacked, curves, masks, by_class    from what ``exhibits`` has computed of its weights
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_at.reporting import pictures
from vit_at.reporting.exhibits import Attacked, Exhibits
from vit_at.reporting.study import Group, Run, Table, accuracies, attack_name
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir.results import Results, in_255ths

_MOST_CLASSES = 20  # drawn; of more, the best and the worst
_PIXELS = 96  # side that small images are enlarged to, at least


@dataclasses.dataclass(frozen=True)
class Section:
    """title and note: text; charts: SVG; cards: groups of (caption, data URI), each with a text."""

    title: str
    note: str = ""
    charts: tuple[str, ...] = ()
    cards: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()


# Metric and title.
_CURVES = (
    ("loss", "Training loss"),
    ("learning_rate", "Learning rate"),
    ("gradient_norm", "Gradient norm (before clipping)"),
    ("keep_probability", "Keep probability of ARD and PRM"),
    ("eps", "eps of the training attack"),
)


def training(runs: Mapping[str, Run]) -> Section:
    """Curves over epochs; of one run or, overlaid, of several by name."""
    charts = [_accuracies(runs)] if len(runs) == 1 else _compared_accuracies(runs)
    for metric, title in _CURVES:
        under = runs if metric != "eps" else {n: r for n, r in runs.items() if _attacks(r)}
        lines = {name: run.series(metric) for name, run in under.items()}
        lines = {name: line for name, line in lines.items() if line[0]}
        constant = all(len(set(line[1])) == 1 for line in lines.values())
        if lines and not (metric == "eps" and constant):
            charts.append(pictures.line_chart(title, lines, x="epoch"))
    note = "Each point of a long curve is the mean of its neighbours. "
    return Section("Training", note + _validation_note(runs), tuple(charts))


def _attacks(run: Run) -> bool:
    return OBJECTIVES[run.config["objective"]].attack is not None


def _validation_note(runs: Mapping[str, Run]) -> str:
    if not any(_validation_attack(run) for run in runs.values()):
        return ""
    return "Validation is on training images that were held out."


def _validation_attack(run: Run) -> str | None:
    """The metric of robust validation, such as 'validation/pgd-10'."""
    names = {name for line in run.metrics for name in line if name.startswith("validation/")}
    return next(iter(sorted(names - {"validation/clean"})), None)


def _accuracies(runs: Mapping[str, Run]) -> str:
    (run,) = runs.values()
    attack = _validation_attack(run)
    wanted = {
        "training, adversarial": "accuracy_adv",
        "training, clean": "accuracy_clean",
        "validation, clean": "validation/clean",
    }
    if attack:
        wanted[f"validation, {attack.removeprefix('validation/').upper()}"] = attack
    lines = {name: run.series(metric) for name, metric in wanted.items()}
    lines = {name: line for name, line in lines.items() if line[0]}
    return pictures.line_chart("Accuracy", lines, x="epoch", percent=True)


def _compared_accuracies(runs: Mapping[str, Run]) -> list[str]:
    charts = []
    for title, of in (
        ("Validation accuracy, clean", lambda run: "validation/clean"),
        ("Validation accuracy under attack", _validation_attack),
    ):
        lines = {name: run.series(of(run)) for name, run in runs.items() if of(run)}
        lines = {name: line for name, line in lines.items() if line[0]}
        if lines:
            charts.append(pictures.line_chart(title, lines, x="epoch", percent=True))
    return charts


def by_attack(records: Sequence[dict[str, Any]]) -> Section:
    """Bars of the accuracy under each attack, and what AutoAttack's parts left standing."""
    bars = {_with_eps(record): {"accuracy": [record["accuracy"]]} for record in records}
    charts = [pictures.bar_chart("", bars)]
    for record in records:
        if "cascade" in record:
            cascade = {name: {"accuracy": [value]} for name, value in record["cascade"].items()}
            charts.append(pictures.bar_chart("Left by AutoAttack, attack after attack", cascade))
    return Section("Accuracy by attack", charts=tuple(charts))


def _with_eps(record: dict[str, Any]) -> str:
    eps = record["protocol"].get("eps")
    name = attack_name(record["attack"])
    return f"{name}, eps {in_255ths(eps)}" if eps else name


def compared(groups: Sequence[Group], table: Table) -> Section | None:
    """Bars of each group: clean, and under the attack that leaves least of those on all groups."""
    measured = [accuracies(group) for group in groups]
    common = [c for c in table.columns if all(c in found for found in measured)]
    clean = [column for column in common if column.attack == "clean"]
    attacks = [column for column in common if column.attack != "clean"]
    hardest = sorted(attacks, key=lambda c: np.mean([np.mean(f[c]) for f in measured]))
    shown = clean[:1] + hardest[:1]
    if not shown:
        return None
    bars = {
        group.name: {attack_name(column.attack): found[column] for column in shown}
        for group, found in zip(groups, measured, strict=True)
    }
    note = "Bars are means; with several seeds, each is a circle."
    return Section("Side by side", note, (pictures.bar_chart("", bars),))


def audit_curves(record: dict[str, Any]) -> Section:
    """The curves of an AutoAttack evaluation's audit."""
    audit = record["audit"]
    by_eps, by_steps = dict(audit["eps_curve"]), dict(audit["steps_curve"])
    note = "APGD on the cross-entropy, on the first test images, as a check of the evaluation."
    return _curves("Accuracy over eps and steps (audit)", note, by_eps, by_steps)


def curves(exhibits: Exhibits) -> Section:
    """Accuracy over eps and over attack steps, measured now."""
    by_eps, by_steps, count = exhibits.curves()
    threat = exhibits.threat
    note = (
        f"The first {count} test images. PGD-{threat.steps} over eps, its step growing with "
        f"it; over steps at eps {in_255ths(threat.eps)}. An accuracy that does not fall to 0 at "
        "large eps, or that rises with more steps, means that the attack fails."
    )
    return _curves("Accuracy over eps and steps", note, by_eps, by_steps)


def _curves(title, note, by_eps, by_steps) -> Section:
    eps = {"": (list(by_eps), list(by_eps.values()))}
    steps = {"": (list(by_steps), list(by_steps.values()))}
    return Section(
        title,
        note,
        (
            pictures.line_chart("Over eps", eps, x="eps", percent=True, marked=True),
            pictures.line_chart(
                "Over attack steps", steps, x="steps", percent=True, marked=True, log=True
            ),
        ),
    )


def by_class(found: Mapping[str, Mapping[str, float]]) -> Section:
    """Bars of each class's accuracies: clean, and under the strongest attack that there is."""
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
        note = f"The {half} least and the {half} most robust of {len(ranked)} classes."
    return Section("Accuracy by class", note, (pictures.bar_chart("", bars),))


def attacked(shown: Attacked, class_names: Sequence[str], exhibits: Exhibits) -> Section:
    """Each test image clean, attacked, the perturbation, and where the model looks."""
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
            looks = zip(("attention, clean", "attention, attacked"), shown.rollout, strict=True)
            points = (clean, adversarial)
            images += [
                (text, pictures.heat(weights[i], point))
                for (text, weights), point in zip(looks, points, strict=True)
            ]
        uris = tuple((caption, pictures.png(pixels, scale)) for caption, pixels in images)
        cards.append((f"labelled “{class_names[label]}”", uris))
    threat = exhibits.threat
    note = (
        f"The first {len(cards)} test images, not chosen ones, under PGD-{threat.steps} with "
        f"{threat.norm} eps {in_255ths(threat.eps)}; below each what the model sees in it and with "
        "what confidence. Grey in the perturbation is no change. "
    )
    if shown.rollout is None:
        note += "Attention is not drawn: this architecture attends within windows, not over all."
    else:
        note += "Attention is the rollout over all blocks; yellow is where the model looks most."
    return Section("Attacked images", note, cards=tuple(cards))


def _saw(probabilities: np.ndarray, label: int, class_names: Sequence[str]) -> str:
    seen = int(probabilities.argmax())
    mark = "✓" if seen == label else "✗"
    return f"{mark} {class_names[seen]}, {probabilities[seen]:.0%}"


def masks(exhibits: Exhibits) -> Section | None:
    """What ARD and PRM mask in one training attack; None where both are off."""
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
        note += "PRM: in the marked patches the perturbation is zeroed for this step. "
    if draws.attn_keep is not None:
        note += "ARD: one circle a block, ● passes the gradient of its attention, ○ does not."
    return Section("What ARD and PRM mask", note, cards=(("", tuple(images)),))


def of_model(exhibits: Exhibits, run: Run, results: Results) -> list[Section]:
    """All sections that need the weights."""
    names = exhibits.class_names
    found = exhibits.by_class(results, run.tested)
    sections = [
        by_class(found) if found else None,
        curves(exhibits) if exhibits.affordable else None,
        attacked(exhibits.attacked(), names, exhibits),
        masks(exhibits),
    ]
    return [section for section in sections if section is not None]
