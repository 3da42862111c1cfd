"""The documentation's examples: Python blocks are run, commands are checked with their flags."""

import contextlib
import functools
import importlib.util
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest

import vit_at
from vit_at import models
from vit_at.reporting import exported, study
from vit_at.reporting.jobs import jobs_of
from vit_at.training import objectives

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {"audit", "extend"}  # a whole AutoAttack; a training run
LINKS = re.compile(r"\]\(([^)#\s]+)")
# Packages of other frameworks; ``load`` is that of an export.
OTHERS = {"torch", "timm", "autoattack", "robustbench", "load"}
IMPORTS = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@functools.cache
def given() -> dict:
    """The names that blocks use without defining them: a model, images and their labels."""
    model = models.create(
        "deit_tiny_patch16_224",
        num_classes=4,
        image_size=8,
        patch_size=2,
        embed_dim=8,
        depth=1,
        num_heads=2,
    )
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    params = models.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    images = rng.random((4, 8, 8, 3), np.float32)
    return {
        "apply": apply,
        "params": params,
        "logits_fn": functools.partial(apply, params),
        "images": images,
        "labels": np.arange(4),
        "key": jax.random.key(0),
    }


def with_marks(page):
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW))


def of_others(block: str) -> bool:
    """Whether a block needs another framework."""
    return bool(OTHERS & set(IMPORTS.findall(block)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current directory, with an export where the documentation has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    return tmp_path


def export_to(directory: str) -> None:
    options = {"images": 12, "stablehlo": bool(importlib.util.find_spec("flatbuffers"))}
    exported.export_workdir("digits_deit_64x2", "", directory, **options)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES])
def test_python_blocks_run_in_the_order_of_their_page(page):
    names = dict(given())
    if page.stem == "export":
        pytest.importorskip("flatbuffers")
        export_to("runs/digits_sgd/export")
    with unittest.mock.patch.dict(objectives.OBJECTIVES):  # extend.md adds one
        for block in blocks(page, "python"):
            if not of_others(block):
                exec(compile(block, str(page), "exec"), names)


def shorten_autoattack(monkeypatch) -> None:
    """Few steps for the official code; benchmarks/official_autoattack.py compares its numbers."""
    from autoattack import AutoAttack

    name = "set_version" if hasattr(AutoAttack, "set_version") else "_set_version"  # PyPI's copy
    standard = getattr(AutoAttack, name)

    def shortened(self, version="standard"):
        standard(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 3
        self.square.n_queries = 10

    monkeypatch.setattr(AutoAttack, name, shortened)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(map(of_others, blocks(p, "python")))],
    ids=lambda page: page.stem,
)
def test_blocks_of_pytorch_run_in_the_order_of_their_page(page, monkeypatch):
    """Those whose packages are installed, and the official AutoAttack's under either name."""
    pytest.importorskip("torch")
    pytest.importorskip("timm")
    official = importlib.util.find_spec("autoattack")
    if not official:
        monkeypatch.setitem(sys.modules, "autoattack", pytest.importorskip("pyautoattack"))
    shorten_autoattack(monkeypatch)
    monkeypatch.delitem(sys.modules, "load", raising=False)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    export_to("runs/digits_sgd/export")
    names: dict = {}
    for block in filter(of_others, blocks(page, "python")):
        if "robustbench" in block and not (official and importlib.util.find_spec("robustbench")):
            continue  # it needs the official package itself
        if "onnx" in block and not importlib.util.find_spec("onnxscript"):
            continue
        exec(compile(block, str(page), "exec"), names)
    if pathlib.Path("model.onnx").exists():
        check_onnx(names["load"](), names["images"])


def check_onnx(model, images) -> None:
    """The logits of model.onnx are those of the model that it was made from."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession("model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(logits, model(images).detach(), atol=1e-5)


# The commands of ``vit-at``, as the modules that they run.
COMMANDS = {name: f"vit_at.{name}" for name in ("evaluate", "report", "export", "prepare")}
COMMANDS |= {"train": "vit_at.main", "sweep": "vit_at.reporting.sweep"}


def words_of(command: str) -> list[str]:
    """A command as [module or script, argument, ...]; `vit-at X` is the module that it runs."""
    words = shlex.split(command)
    if words[0] == "vit-at":
        words = [COMMANDS[words[1]], *words[2:]]
        if words[0] == "vit_at.main" and not words[1].startswith("-"):
            words[1] = f"--config={words[1]}"
        return words
    return words[2:] if words[1] == "-m" else words[1:]


def commands() -> list[str]:
    """Every command of the bash blocks that runs a program of ours, on one line."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            text = re.sub(r"\s*\\\n\s*", " ", block)
            lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
            found += [part.strip() for line in lines for part in line.split("&&")]
    ours = re.compile(
        rf"\S*python3? (-m vit_at\.|launch/|benchmarks/)|vit-at ({'|'.join(COMMANDS)}) "
    )
    return sorted({command for command in found if ours.match(command)})


TRAINING = [command for command in commands() if words_of(command)[0] == "vit_at.main"]


def test_there_are_commands_to_test():
    entries = {words_of(command)[0] for command in commands()}
    assert {"vit_at.main", "vit_at.evaluate", "vit_at.prepare", "vit_at.report"} <= entries
    assert "vit_at.reporting.sweep" in entries


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_give_a_valid_configuration(command, parse):
    words = words_of(command)[1:]
    objectives.check(parse(*(word for word in words if word.startswith(("--config", "--workdir")))))


@functools.cache
def help_of(entry: str) -> str:
    """The output of --help of a module or a script."""
    if not entry.startswith("vit_at."):
        command = [sys.executable, ROOT / entry, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(entry).main(["--help"])
    return shown.getvalue()


@pytest.mark.parametrize("command", [c for c in commands() if c not in TRAINING])
def test_other_commands_take_the_flags_they_are_given(command):
    entry, *own = words_of(command)
    own = own[: own.index("--")] if "--" in own else own
    if entry == "vit_at.reporting.sweep":
        assert jobs_of(own[0])
    names = {word.partition("=")[0] for word in own if word.startswith("--")}
    assert all(name in help_of(entry) for name in names), names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page):
    for target in LINKS.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_module_that_documentation_names_exists():
    for page in PAGES:
        for name in set(re.findall(r"\bvit_at(?:\.[a-z_]+)+", page.read_text())):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), name


def test_the_tables_of_the_study_are_those_of_the_committed_results():
    text = (ROOT / "docs" / "study.md").read_text()
    tables = re.findall(r"<!-- (results/\w+\.json) -->\n\n(.*?)\n<!-- end -->", text, re.DOTALL)
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("results/*")}
    assert {file for file, _ in tables} == files - {"results/dtype_digits.json"}
    for file, table in tables:
        found = study.compare(study.groups(study.find([ROOT / file]))).markdown()
        assert table == found, f"vit-at report {file} --out=table.md"


def rows_of(table: str, columns: tuple[int, ...]) -> set[tuple[str, ...]]:
    """The cells of these columns of a Markdown table, without its head."""
    lines = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return {tuple(line[column].strip() for column in columns) for line in lines}


@pytest.mark.parametrize(
    ("page", "begin", "columns", "file", "theirs"),
    [
        ("README.md", "| training | clean % | PGD-20 % | CW-20 % | AutoAttack % |",
         (1, 3, 2), "cifar10_attack", (2, 3, 4)),
        ("docs/index.md", "| training | clean % | PGD-20 % | PGD-100 % | CW-20 % |",
         (1, 4, 2, 3), "digits_sgd", (2, 3, 4, 5)),
        ("docs/study.md", "| training in | clean % | PGD-20 % | PGD-100 % | CW-20 % |",
         (1, 4, 2, 3), "dtype_digits", (2, 3, 4, 5)),
    ],
)  # fmt: skip
def test_other_tables_hold_numbers_of_the_committed_results(page, begin, columns, file, theirs):
    text = (ROOT / page).read_text()
    table = text[text.index(begin) :].partition("\n\n")[0]
    table = re.sub(r"\n\|.*`\w+`.*", "", table)  # of a packaged model, which has its own test
    found = study.compare(study.groups(study.find([ROOT / f"results/{file}.json"]))).markdown()
    assert rows_of(table, columns) <= rows_of(found, theirs)
    assert len(rows_of(table, columns)) >= 2


def test_the_readme_gives_the_records_of_the_packaged_models():
    rows = re.findall(
        r"^\| .*`(cifar10_\w+)`\) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == 2
    for name, cells in rows:
        records = {r["attack"]: r for r in vit_at.load(name).record}
        attacks, numbers = ("clean", "pgd-20", "cw-20", "autoattack"), []
        for attack in attacks:
            assert records[attack]["protocol"]["num_examples"] == 1000
            numbers.append(f"{100 * records[attack]['accuracy']:.1f}")
        assert cells.split(" | ") == numbers, name


def test_committed_results_hold_no_path_of_a_machine():
    for path in ROOT.glob("results/*"):
        assert not re.findall(r'"(/|~|[A-Z]:)[^"]*"', path.read_text()), path


def test_committed_results_say_how_and_where_they_were_measured():
    for path in ROOT.glob("results/*"):
        stored = json.loads(path.read_text())
        assert stored["commands"], path
        assert stored["machine"], path
        assert "packages.jax" in stored["protocols"]["clean"], path
