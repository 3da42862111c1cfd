"""The report: one HTML page that needs no network, scripts or other files.

A single run gets its protocol, curves, results beside published ones, and attacked images. Several
runs are compared: their curves in the same charts, and a table of mean and standard deviation over
the seeds. The page names what it can't show, such as the images of a run without a checkpoint.
"""

import dataclasses
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
from absl import logging
from etils import epath

from vit_at.attacks.autoattack.flags import MEANING
from vit_at.errors import UserError
from vit_at.evaluation.transfer import TRANSFER_DIRECTORY, matrices
from vit_at.reporting import charts, robustness, study, study_file
from vit_at.reporting.exhibits import Exhibits
from vit_at.reporting.facts import facts
from vit_at.reporting.outputs import check_report
from vit_at.reporting.run import Run
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import preferred
from vit_at.workdir.files import is_export, is_workdir, write_atomically
from vit_at.workdir.outcomes import threats
from vit_at.workdir.results import RESULTS_FILE, Results, in_255ths, read_records

_PACKAGED = importlib.resources.files("vit_at.reporting") / "packaged"


def write(places: Sequence[str | epath.Path], out: str | epath.Path = "") -> epath.Path:
    """Writes the report of the runs that ``study.find`` finds in these places; returns its path.

    out: its ending decides what is written: ``.html`` the page, ``.md`` the table, ``.json`` a
      study file. Default for a single work directory: WORKDIR/report/index.html.

    Raises:
      UserError: a place without runs, a damaged file, no place to write to, or a file there that
        is no report.
    """
    if out:
        check_report(path := epath.Path(out).expanduser())  # before the runs are read
    runs = study.find(places)
    if not out:
        check_report(path := _default_place(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        study_file.write(path, charts.with_drawn_curves(runs))
    elif path.suffix == ".md":
        write_atomically(path, study.compare(study.groups(runs)).markdown())
    else:
        write_atomically(path, single(runs[0]) if len(runs) == 1 else comparison(runs))
    return path


def _default_place(runs: Sequence[Run]) -> epath.Path:
    if len(runs) == 1 and runs[0].workdir is not None and is_workdir(runs[0].workdir):
        return runs[0].workdir / "report" / "index.html"
    raise UserError(
        "the page of several runs, of an export or of a study file has no default place; add "
        "--out=FILE.html"
    )


def embedded(page: str | epath.Path) -> str:
    """A page at full height as an HTML frame, whose style and the notebook's stay apart."""
    source = html.escape(epath.Path(page).read_text())
    grow = "this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'"
    style = "width:100%;height:900px;border:0"  # until it has loaded
    frame = f'<iframe srcdoc="{source}" onload="{grow}" style="{style}"></iframe>'
    return f"<div>{frame}</div>"  # IPython warns about a frame alone


def write_after_training(workdir: epath.Path) -> epath.Path | None:
    """``write`` at the end of a run; any failure is logged as a warning, and None returned."""
    try:
        return write([workdir])
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        logging.warning(
            "the report could not be written (%s); results and weights are stored, and "
            "'vit-at report %s' tries again",
            reason,
            workdir,
        )
        return None


def single(run: Run) -> str:
    """The page of one run."""
    sections, missing = [], []
    if run.tested:
        sections.append(charts.by_attack(run.main))
        sections += _of_images({"": run}, run.workdir)
    else:
        missing.append(
            f"Nothing has been evaluated yet (there is no {RESULTS_FILE}); run vit-at evaluate."
        )
    if run.curves:
        sections.append(charts.training({"": run}))
    else:
        missing.append("There are no training metrics here, so no curves are drawn.")
    sections += [charts.audit_curves(r) for r in run.tested if "audit" in r]
    try:
        exhibits = _exhibits(run)
    except UserError as error:
        missing.append(f"No attacked images and no accuracy by class: {error}.")
    else:
        sections += charts.of_model(exhibits, run, Results(run.workdir))
        if not exhibits.affordable:
            missing.append(
                "Accuracy over eps and over attack steps would take too long on this machine; the "
                "audit of an AutoAttack evaluation has both."
            )
    return _render(run.config["name"], robustness.headline(run), [run], [], sections, missing)


def _of_images(runs: Mapping[str, Run], workdir: epath.Path | None = None) -> list[charts.Section]:
    """Curves over eps of the runs, and the transfer matrices of a work directory."""
    stored = read_records(workdir / TRANSFER_DIRECTORY) if workdir else []
    found = [robustness.stored_curves(runs), robustness.transfers(matrices(stored))]
    return [section for section in found if section is not None]


def _exhibits(run: Run) -> Exhibits:
    """Of the weights that ``eval.checkpoint`` names, or of the last ones if those are missing.

    Raises:
      UserError: there are no weights, or other processes would have to read them too.
    """
    if run.workdir is None:
        raise UserError("a study file holds no weights")
    if jax.process_count() > 1:
        raise UserError(
            f"this was one of {jax.process_count()} processes; for these sections, run vit-at "
            f"report {run.workdir} in one process"
        )
    which = "" if is_export(run.workdir) else preferred(run.workdir, run.config)
    return Exhibits(registry.read(run.workdir, which))


def comparison(runs: Sequence[Run]) -> str:
    """The page of several runs: their table, and the curves of one run of each group.

    Natural training stands apart from adversarial training, whose losses differ from its.
    """
    members = sorted(study.groups(runs), key=lambda group: group.natural)
    kinds = {"Adversarial training": False, "Natural training": True}
    if len({group.natural for group in members}) == 1:
        kinds = {"Training": members[0].natural}
    table = study.compare(members)
    sections, missing, parts = [], [], []
    if side_by_side := charts.compared(members, table):
        sections.append(side_by_side)
    sections += _of_images({group.name: group.curved for group in members})
    for title, natural in kinds.items():
        own = [group for group in members if group.natural == natural]
        rows = tuple(row for row in table.rows if row[0] in {group.name for group in own})
        parts.append((title, dataclasses.replace(table, rows=rows)))
        if drawn := {group.name: group.drawn for group in own if group.drawn}:
            sections.append(charts.training(drawn, title))
    if without := [f"“{group.name}”" for group in members if not group.drawn]:
        missing.append(f"Training curves of {', '.join(without)}: there are no metrics here.")
    if untested := [run.name for run in runs if not run.tested]:
        missing.append(f"Not evaluated yet: {', '.join(untested)}.")
    found = robustness.compared_headline(members, table)
    return _render(f"{len(runs)} runs compared", found, runs, parts, sections, missing)


def _render(
    title: str,
    headline: str,
    runs: Sequence[Run],
    tables: Sequence[tuple[str, study.Table]],
    sections: Sequence[charts.Section],
    missing: Sequence[str],
) -> str:
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template.filters |= {"attack_name": study.attack_name, "in_255ths": in_255ths}
    template.filters["threats"] = threats
    source = (_PACKAGED / "report.html").read_text()
    return template.from_string(source).render(
        title=title,
        headline=headline.replace(" %", "\N{NO-BREAK SPACE}%"),
        tables=tables,
        sections=sections,
        missing=missing,
        protocol=protocol(runs),
        results=runs[0].tested if len(runs) == 1 else [],
        audits=[found for run in runs for found in audits(run)],
        published=published(runs[0].config),
    )


def protocol(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(label, text) of the runs' configuration and tests; for several, what all share."""
    described = [_protocol(run) for run in runs]
    return [row for row in described[0] if all(row in other for other in described)]


def _protocol(run: Run) -> list[tuple[str, str]]:
    rows = facts(run.config)
    if run.tested:
        measured = run.tested[0]["protocol"]
        weights, packages = measured["weights"], measured.get("packages", {})
        rows += [
            ("tested on", f"{measured['data']}, {measured['num_examples']} images"),
            ("images made square by", measured.get("transform", "squash")),
            ("weights", f"{weights['digest']}{_of_checkpoint(weights)}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ]
    return rows


def _of_checkpoint(weights: dict[str, Any]) -> str:
    """' (best, step 1146)' where a record says so; those of functions and files do not."""
    step = f"step {weights['step']}" if "step" in weights else ""
    words = ", ".join(filter(None, (weights.get("checkpoint"), step)))
    return f" ({words})" if words else ""


def published(config: dict[str, Any]) -> dict[str, Any]:
    """Published results on the same data under the same threat; empty if none are listed.

    images: the test images; entries: whose model, whose measurement, and the transform.
    """
    threat = config["threat"]
    for table in json.loads((_PACKAGED / "published.json").read_text()):
        same_eps = abs(table["eps_255"] - 255 * threat["eps"]) < 1e-3
        if (table["data"], table["norm"]) == (config["data"]["name"], threat["norm"]) and same_eps:
            return table
    return {}


def flags_of(record: dict[str, Any]) -> dict[str, str]:
    """{flag: what was found} by an evaluation, and by its audit."""
    return record.get("flags", {}) | record.get("audit", {}).get("flags", {})


def audits(run: Run) -> list[dict[str, str]]:
    """The flags of each AutoAttack evaluation and of its audit, with their meaning."""
    words = json.loads((_PACKAGED / "flags.json").read_text())
    return [
        {"flag": flag, "meaning": MEANING[flag], "found": detail} | words[flag]
        for record in run.tested
        for flag, detail in flags_of(record).items()
    ]
