"""The documentation's examples: Python blocks are run, commands are checked with their flags."""

import contextlib
import functools
import importlib
import io
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from vit_at import models
from vit_at.config import validate
from vit_at.reporting import study, sweep

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {"audit"}  # a whole AutoAttack
LINKS = re.compile(r"\]\(([^)#\s]+)")
# What ``vit-at COMMAND`` runs.
PROGRAMS = {
    "train": "-m vit_at.main",
    "evaluate": "-m vit_at.evaluate",
    "report": "-m vit_at.report",
    "export": "-m vit_at.export",
    "prepare": "-m vit_at.prepare",
    "sweep": "launch/sweep.py",
}


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


@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES])
def test_python_blocks_run_in_the_order_of_their_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    names = dict(given())
    for block in blocks(page, "python"):
        if "import json, timm, torch" in block:  # of another framework, see test_export
            continue
        exec(compile(block, str(page), "exec"), names)


def as_python(command: str) -> str:
    """``vit-at train RECIPE ...`` as ``python -m vit_at.main --config=FILE ...``, and others."""
    if not command.startswith("vit-at "):
        return command
    name, _, rest = command.removeprefix("vit-at ").partition(" ")
    if name == "train":
        rest = re.sub(r"^\w+", r"--config=configs/\g<0>.py", rest)
    return f"python {PROGRAMS[name]} {rest}"


def commands() -> list[str]:
    """Every command of the bash blocks that runs a program of ours, on one line."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            text = re.sub(r"\s*\\\n\s*", " ", block)
            lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
            found += [as_python(part.strip()) for line in lines for part in line.split("&&")]
    ours = re.compile(r"\S*python3? (-m vit_at\.|launch/|results/|benchmarks/)")
    return sorted({command for command in found if ours.match(command)})


def test_there_are_commands_to_test():
    entries = {command.split()[2] for command in commands() if " -m " in command}
    assert {"vit_at.main", "vit_at.evaluate", "vit_at.prepare", "vit_at.report"} <= entries


@pytest.mark.parametrize("command", [c for c in commands() if "-m vit_at.main" in c])
def test_training_commands_give_a_valid_configuration(command, parse):
    words = shlex.split(command)[3:]
    validate(parse(*(word for word in words if word.startswith(("--config", "--workdir")))))


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


@pytest.mark.parametrize("command", [c for c in commands() if "-m vit_at.main" not in c])
def test_other_commands_take_the_flags_they_are_given(command):
    words = shlex.split(command)[1:]
    words = words[1:] if words[0] == "-m" else words
    entry, own = words[0], words[1 : words.index("--") if "--" in words else None]
    if entry == "launch/sweep.py":
        assert sweep.runs_of(own[0])
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
    tables = re.findall(r"<!-- (results/\w+) -->\n\n(.*?)\n<!-- end -->", text, re.DOTALL)
    digits = {str(path.relative_to(ROOT)) for path in ROOT.glob("results/digits_*")}
    assert {directory for directory, _ in tables} == digits
    for directory, table in tables:
        found = study.table(study.groups(study.find([ROOT / directory]))).markdown()
        assert table == found, f"python -m vit_at.report {directory} --out=table.md"
