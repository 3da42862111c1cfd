"""Work directories -> one HTML page that needs nothing else: no network, no scripts, no files.

    python -m vit_at.report runs/NAME                    # writes runs/NAME/report/index.html
    python -m vit_at.report runs/A runs/B --out=page.html
    python -m vit_at.report results/digits_sgd --out=table.md    # only the table, as Markdown

A directory that is no work directory stands for those right inside it. One run is shown whole:
protocol, curves, results beside published ones, attacked images. Several are compared: curves
overlaid, and a table with mean and standard deviation over the seeds. What a work directory lacks,
such as a checkpoint, is said in a sentence in its place.
"""

import html
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import jax
import jinja2
from absl import logging
from etils import epath

from vit_at.attacks.autoattack.audit import MEANING
from vit_at.config import flatten
from vit_at.errors import UserError
from vit_at.reporting import charts, study
from vit_at.reporting.exhibits import Exhibits
from vit_at.reporting.study import Run
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir.checkpoint import load_trained
from vit_at.workdir.files import write_atomically
from vit_at.workdir.results import RESULTS_FILE, Results, in_255ths

_PACKAGED = importlib.resources.files("vit_at.reporting") / "packaged"


def write(workdirs: Sequence[str | epath.Path], out: str | epath.Path = "") -> epath.Path:
    """Writes the page of these runs, or with a name in ``.md`` their table; returns its path.

    out: default WORKDIR/report/index.html, which only a single work directory has.

    Raises:
      UserError: a place without runs, a damaged file, or no place to write to.
    """
    runs = study.find(workdirs)
    if not out and len(runs) > 1:
        raise UserError(
            f"{len(runs)} runs are compared, and none of them owns the page; say where it goes "
            "with --out=FILE.html"
        )
    path = epath.Path(out) if out else runs[0].workdir / "report" / "index.html"
    if path.suffix == ".md":
        text = study.table(study.groups(runs)).markdown()
    else:
        text = single(runs[0]) if len(runs) == 1 else comparison(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def embedded(page: str | epath.Path, height: int = 900) -> str:
    """A page as HTML to put inside another, such as a notebook, whose style it does not touch."""
    source = html.escape(epath.Path(page).read_text())
    return f'<iframe srcdoc="{source}" style="width:100%;height:{height}px;border:0"></iframe>'


def write_after_training(workdir: epath.Path) -> epath.Path | None:
    """``write`` at the end of a run, which must not fail for want of a picture: it only warns."""
    try:
        return write([workdir])
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        logging.warning(
            "the report could not be written (%s); results and weights are stored, and "
            "'python -m vit_at.report %s' tries again",
            reason,
            workdir,
        )
        return None


def single(run: Run) -> str:
    """The page of one run."""
    sections, missing = [], []
    if run.tested:
        sections.append(charts.by_attack(run.tested))
    else:
        missing.append(
            f"Nothing has been evaluated yet (there is no {RESULTS_FILE}): "
            "python -m vit_at.evaluate does it."
        )
    if run.metrics:
        sections.append(charts.training({"": run}))
    else:
        missing.append("Training has left no metrics here, so no curves are drawn.")
    sections += [charts.audit_curves(r) for r in run.tested if "audit" in r]
    try:
        exhibits = _exhibits(run)
    except UserError as error:
        missing.append(f"No attacked images and no accuracy by class, as {error}.")
    else:
        sections += charts.of_model(exhibits, run, Results(run.workdir))
        if not exhibits.affordable:
            missing.append(
                "Accuracy over eps and over attack steps, which would take too long on this "
                "machine; an AutoAttack evaluation has both in its audit."
            )
    return _render(
        title=run.config["name"],
        runs=[run],
        table=None,
        sections=sections,
        missing=missing,
    )


def _exhibits(run: Run) -> Exhibits:
    """Of the weights that the configuration tests, or else of the last ones.

    Raises:
      UserError: there are none, or not all processes are here to read them together.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"this was one of {jax.process_count()} processes; for them, run python -m "
            f"vit_at.report {run.workdir} alone"
        )
    which = run.config["eval"]["checkpoint"]
    there = (run.workdir / "checkpoints" / which).exists()
    return Exhibits.of(load_trained(run.workdir, which if there else "last"))


def comparison(runs: Sequence[Run]) -> str:
    """The page of several runs: their table, and the curves of each group's first run."""
    members = study.groups(runs)
    shown = {group.name: group.runs[0] for group in members}
    drawn = {name: run for name, run in shown.items() if run.metrics}
    table = study.table(members)
    sections, missing = [], []
    if side_by_side := charts.compared(members, table):
        sections.append(side_by_side)
    if drawn:
        sections.append(charts.training(drawn))
    for name in shown.keys() - drawn.keys():
        missing.append(f"“{name}” has left no metrics here, so its curves are not drawn.")
    untested = [str(run.workdir) for run in runs if not run.tested]
    if untested:
        missing.append(f"Not evaluated yet: {', '.join(untested)}.")
    return _render(
        title=f"{len(runs)} runs compared",
        runs=runs,
        table=table,
        sections=sections,
        missing=missing,
    )


def _render(*, runs: Sequence[Run], **values: Any) -> str:
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (_PACKAGED / "report.html").read_text()
    return template.from_string(source).render(
        protocol=protocol(runs),
        results=[_result(record) for record in runs[0].tested] if len(runs) == 1 else [],
        audits=[found for run in runs for found in audits(run)],
        published=published(runs[0].config),
        **values,
    )


def protocol(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(what, how) of the runs; of several, only what they have in common."""
    described = [dict(_protocol(run)) for run in runs]
    return [
        (what, how)
        for what, how in described[0].items()
        if all(other.get(what) == how for other in described)
    ]


def _protocol(run: Run) -> list[tuple[str, str]]:
    config = run.config
    model, data, threat, optimizer = (config[n] for n in ("model", "data", "threat", "optimizer"))
    sizes = [
        f"{name} {model[name]:g}" for name in ("embed_dim", "depth", "num_heads") if model[name]
    ]
    if model["patch_size"]:
        sizes.append(f"patch {model['patch_size']}")
    attack = "none"
    if OBJECTIVES[config["objective"]].attack:
        attack = (
            f"{threat['norm']}, eps {in_255ths(threat['eps'])}, {threat['steps']} steps of "
            f"{in_255ths(threat['step_size'])}"
        )
        if threat["eps_warmup_epochs"]:
            attack += f", eps growing over {threat['eps_warmup_epochs']:g} epochs"
    update = [optimizer["name"], f"lr {optimizer['learning_rate']:g}, {optimizer['schedule']}"]
    update += [f"weight decay {optimizer['weight_decay']:g}"]
    update += [f"clipped at {optimizer['clip_norm']:g}"] if optimizer["clip_norm"] else []
    rows = [
        ("training", study.method(flatten(config))),
        ("model", ", ".join([model["name"], *sizes])),
        ("starts from", model["pretrained"] or "scratch"),
        ("data", f"{data['name']} at {data['image_size']} px, {data['train_split']}"),
        ("attack in training", attack),
        ("optimiser", ", ".join(update)),
        ("length", f"{config['epochs']} epochs, batch {config['batch_size']}"),
        ("matrix products", config["dtype"]),
        ("seed", str(config["seed"])),
    ]
    if run.tested:
        measured = run.tested[0]["protocol"]
        weights, packages = measured["weights"], measured["packages"]
        rows += [
            ("tested on", f"{measured['data']}, {measured['num_examples']} images"),
            ("weights", f"{weights['digest']} ({weights['checkpoint']}, step {weights['step']})"),
            ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ]
    return rows


def _result(record: dict[str, Any]) -> dict[str, str]:
    """A record as the cells of its row."""
    measured = record["protocol"]
    threat = []
    if "eps" in measured:
        threat.append(f"{measured['norm']} {in_255ths(measured['eps'])}")
    if "step_size" in measured:
        threat.append(f"step {in_255ths(measured['step_size'])}, {measured['restarts']} restart(s)")
    return {
        "attack": study.attack_name(record["attack"]),
        "accuracy": f"{100 * record['accuracy']:.2f}",
        "error": f"{100 * record['standard_error']:.2f}",
        "images": str(measured["num_examples"]),
        "threat": ", ".join(threat),
    }


def published(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Published results on the same data under the same threat; none are known for most."""
    threat = config["threat"]
    for table in json.loads((_PACKAGED / "published.json").read_text()):
        same_eps = abs(table["eps_255"] - 255 * threat["eps"]) < 1e-3
        if (table["data"], table["norm"]) == (config["data"]["name"], threat["norm"]) and same_eps:
            return table["entries"]
    return []


def audits(run: Run) -> list[dict[str, str]]:
    """What the audit of each AutoAttack evaluation has found, in words."""
    found = []
    words = json.loads((_PACKAGED / "flags.json").read_text())
    for record in run.tested:
        for flag, detail in record.get("audit", {}).get("flags", {}).items():
            about = {"flag": flag, "meaning": MEANING[flag], "found": detail}
            found.append(about | words[flag])
    return found
