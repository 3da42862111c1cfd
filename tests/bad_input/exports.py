"""Exports and reports: places that can't be written, and files that are not theirs."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from bad_input.case import Case
from bad_input.weights import model

from vit_at.configs import digits_sgd
from vit_at.models import init_params
from vit_at.reporting.exported import export

Content = str | bytes | None  # None: a directory
METADATA = {
    "name": "mine",
    "architecture": "deit_tiny_patch16_224",
    "normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3},
}
CONFIG = json.dumps(digits_sgd.get_config("smoke").to_dict())
TABLE = "| training | seeds |\n| --- | --- |\n| AT | 1 |\n"


TRAINING = json.loads(digits_sgd.get_config().to_json())


def files(contents: dict[str, Content]) -> Callable[[pathlib.Path], None]:
    """Writes {path: content} into a folder."""

    def prepare(folder: pathlib.Path) -> None:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def description(**changes: Any) -> str:
    """model.json of an export whose weights are b"w" and whose card is b"c"."""
    digests = {
        name: hashlib.sha256(content.encode()).hexdigest()
        for name, content in {"model.safetensors": "w", "README.md": "c"}.items()
    }
    weights = {"weights": {"sha256": digests["model.safetensors"]}}
    return json.dumps(METADATA | weights | {"files": digests} | changes)


TRAINED = description(training=TRAINING, checkpoint={"step": 1}, num_classes=2)


@functools.cache
def params() -> Any:
    return init_params(model(), jax.random.key(0))


def over(contents: dict[str, Content], says: str, **metadata: Any) -> Case:
    """An export into a folder with these files."""
    return Case(lambda f: export(params(), model(), f, METADATA | metadata), says, files(contents))


def report(out: str, says: str, contents: dict[str, Content] | None = None) -> Case:
    """A report of a run without results into a folder with these files."""
    return Case(
        ["report", "run", f"--out={out}"],
        says,
        files({"run/config.json": CONFIG, "run/results.json": "[]"} | (contents or {})),
        corrected=["report", "run", "--out=table.md"],
    )


def pipe(name: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: os.mkfifo(folder / name)


def linked(folder: pathlib.Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").symlink_to("notes.txt")


OURS: dict[str, Content] = {
    "model.json": description(),
    "model.safetensors": "w",
    "README.md": "c",
}
FOREIGN = "holds {}, which an export of this run has not written"
JSON, WEIGHTS, CARD = (
    FOREIGN.format(name) for name in ("model.json", "model.safetensors", "README.md")
)

EXPORTS = {
    "export to a file": Case(
        ["export", "run", "--output=o"],
        "o is no directory; choose another --output",
        files({"o": ""}),
    ),
    "export below a file": Case(
        ["export", "run", "--output=o/a/b"], "o is no directory", files({"o": ""})
    ),
    "export to a pipe": Case(["export", "run", "--output=o"], "o is no directory", pipe("o")),
    "export of a file": Case(["export", "o"], "o is no work directory", files({"o": ""})),
    "export of an export without a place": Case(
        ["export", "."], "is an export already; give another place by --output", files(OURS)
    ),
    "export of an export that lacks its training": Case(
        ["export", ".", "--output=o"], "no 'training' and 'checkpoint'", files(OURS)
    ),
    "report of an export that lacks its training": Case(
        ["report", ".", "--out=o.html"],
        "no 'training' and 'checkpoint'",
        files(OURS | {"config.json": "{}"}),
    ),
    "report of an export without a place": Case(
        ["report", "digits_deit_64x2"],
        "the page of .* an export .* has no default place; add --out=FILE.html",
        corrected=["report", "digits_deit_64x2", "--out=new/table.md"],
    ),
    "export over another loader": over({"load.py": "mine"}, FOREIGN.format("load.py")),
    "export over a run": over({"config.json": CONFIG}, FOREIGN.format("config.json")),
    "export of fewer images than none": Case(
        ["export", "digits_deit_64x2", "--output=o", "--images=-1"], "--images is -1, but"
    ),
    "export of more images than there are": Case(
        ["export", "digits_deit_64x2", "--output=o", "--images=999"],
        "--images is 999, but digits/1.0.0 test has 359; .* leave it out to export none",
    ),
    "export of images without their data": Case(
        ["export", "cifar10_convit_96x4", "--output=o", "--images=1", "--data_dir=none"],
        "cifar10.*none",
    ),
    "export of a run without weights": Case(
        ["export", "run"], "run holds no 'best' checkpoint yet", files({"run/config.json": CONFIG})
    ),
    "export of weights by a wrong name": Case(["export", "run", "--checkpoint=first"], "invalid"),
    "export over a project's README": over({"README.md": "# Mine\n"}, CARD),
    "export over an empty README": over({"README.md": ""}, CARD),
    "export over another model.json": over({"model.json": '{"name": "mine"}'}, JSON),
    "export over a list": over({"model.json": "[1]"}, JSON),
    "export over null": over({"model.json": "null"}, JSON),
    "export over a word": over({"model.json": '"weights"'}, JSON),
    "export over broken JSON": over({"model.json": "{"}, JSON),
    "export over JSON in another encoding": over({"model.json": b"\xff\xfe{\0}\0"}, JSON),
    "export over other weights": over({"model.safetensors": b"mine"}, WEIGHTS),
    "export over all three": over(
        {"model.json": "{}", "model.safetensors": "", "README.md": ""},
        "holds README.md and model.json and model.safetensors, which",
    ),
    "export over a folder named README.md": over({"README.md": None}, CARD),
    "export over a folder named model.json": over({"model.json": None}, JSON),
    "export over a pipe": over({}, JSON)._replace(prepare=pipe("model.json")),
    "export over a link": over({}, CARD)._replace(prepare=linked),
    "export over a card that was edited": over(OURS | {"README.md": "# Mine"}, CARD),
    "export over weights that were replaced": over(OURS | {"model.safetensors": "v"}, WEIGHTS),
    "export over another run": over(OURS | {"model.json": description(name="other")}, "README.md"),
    "export over another architecture": over(OURS, "README.md and model.json", architecture="x"),
    "export over another configuration": over(
        OURS | {"model.json": description(training=TRAINING)},
        "model.json",
        training=TRAINING | {"epochs": 2},
        dataset="digits",
    ),
    "export over a configuration of another kind": over(
        OURS | {"model.json": description(training=[])},
        "model.json",
        training=TRAINING,
        dataset="digits",
    ),
    "export over one without digests": over(
        OURS | {"model.json": json.dumps(METADATA)},
        "README.md and model.json and model.safetensors",
    ),
    "evaluate an export without its weights": Case(
        ["evaluate", "."],
        "model.safetensors is missing; copy it beside model.json",
        files(
            {"model.json": description(training=TRAINING, checkpoint={"step": 1}, num_classes=2)}
        ),
    ),
    "evaluate an export with other weights": Case(
        ["evaluate", "."],
        "model.safetensors is not the file that model.json describes",
        files(OURS | {"model.safetensors": "v"} | {"model.json": TRAINED}),
    ),
    "evaluate an export without its training": Case(
        ["evaluate", "."], "no 'training' and 'checkpoint'", files(OURS)
    ),
}

REPORTS = {
    "report to a folder": report("o", "o; its name must end in one of .html", {"o": None}),
    "report to a folder named as a page": report(
        "o.html", "o.html, which exists and is no page of vit_at", {"o.html": None}
    ),
    "report as PDF": report("o.pdf", "must end in one of .html .a page., .md"),
    "report without a suffix": report("table", "must end in"),
    "report with a suffix alone": report(".md", "must end in"),
    "report in capitals": report("o.HTML", "must end in"),
    "report to a device": report("/dev/null", "must end in"),
    "report below a file": report("o/a.html", "o is no directory; choose another --out", {"o": ""}),
    "report over a web page": report(
        "o.html", "no page of vit_at", {"o.html": "<!doctype html><title>mine</title>"}
    ),
    "report over bytes": report("o.html", "no page of vit_at", {"o.html": b"\xff\xfe\0"}),
    "report over a README": report("README.md", "no table of vit_at", {"README.md": "# Mine\n"}),
    "report over a README with our table": report(
        "README.md", "no table of vit_at", {"README.md": f"{TABLE}\nMine.\n"}
    ),
    "report over the results": report("run/results.json", "no study file of vit_at"),
    "report over the configuration": report("run/config.json", "no study file of vit_at"),
    "report over another JSON": report("a.json", "no study file", {"a.json": '{"format": 1}'}),
    "report over a page under another suffix": report(
        "o.md", "no table of vit_at", {"o.md": "<!doctype html><title>a · vit_at</title>"}
    ),
    "report where its folder is a file": Case(
        ["report", "run"],
        "run/report is no directory",
        files({"run/config.json": CONFIG, "run/report": ""}),
    ),
    "report where its page is not ours": Case(
        ["report", "run"],
        "index.html, which exists and is no page",
        files({"run/config.json": CONFIG, "run/report/index.html": "mine"}),
    ),
    "report over a pipe": Case(
        ["report", "run", "--out=o.html"], "o.html, which exists and is no page", pipe("o.html")
    ),
    "report of several runs without a place": Case(
        ["report", "a", "b"],
        "has no default place; add --out=FILE.html",
        files({"a/config.json": CONFIG, "b/config.json": CONFIG}),
        corrected=["report", "a", "b", "--out=new/table.md"],
    ),
    "report of a page": Case(["report", "o.html"], "o.html", files({"o.html": "<html>"})),
}

CASES = EXPORTS | REPORTS
