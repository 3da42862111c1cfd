"""The order of the packages, and the maps of the code in README and docs/architecture.md."""

import ast
import functools
import graphlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import layout  # noqa: E402
from layout import FILES, IMPORTS, ORDER, PACKAGE, room_of  # noqa: E402


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_rooms_above_its_own(name):
    own = ORDER.index(room_of(name))
    below = {other for other in IMPORTS[name] if ORDER.index(room_of(other)) > own}
    if name.endswith("__init__"):  # a package may re-export what is inside it
        below = {o for o in below if not o.startswith(name.removesuffix("__init__"))}
    assert not below


def test_within_a_room_imports_go_one_way():
    inner = {
        name: {o for o in found if not o.endswith("__init__")}
        for name, found in IMPORTS.items()
        if not name.endswith("__init__")
    }
    graphlib.TopologicalSorter(inner).prepare()  # raises CycleError


def test_few_files_lie_outside_of_the_rooms():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_the_reader_of_imports_finds_those_there_are():
    assert {"console", "errors", "training.loop", "workdir.results"} <= IMPORTS["main"]
    assert "attacks.__init__" in IMPORTS["evaluate"]


# --- What importing a command loads -----------------------------------------------------------

WATCHED = {"tensorflow", "torch", "matplotlib", "jinja2"}
ENTRIES = ["main", *sorted({*layout.modules_of("commands")} - {"main"})]


@functools.cache
def loaded() -> dict[str, set[str]]:
    """{command: the watched packages loaded after importing it and those before it}."""
    code = (
        "import importlib, json, sys; found = {}\n"
        f"for entry in {ENTRIES}:\n"
        "    importlib.import_module(f'vit_at.{entry}')\n"
        f"    found[entry] = list({WATCHED} & sys.modules.keys())\n"
        "print(json.dumps(found))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return {entry: set(names) for entry, names in json.loads(ended.stdout).items()}


@pytest.mark.parametrize("entry", ENTRIES)
def test_commands_import_neither_tensorflow_nor_torch(entry):
    assert {"main", "evaluate", "export", "report"} <= set(ENTRIES)
    assert not loaded()[entry] & {"tensorflow", "torch"}


def test_training_does_not_wait_for_what_only_the_report_needs():
    assert not loaded()["main"] & {"matplotlib", "jinja2"}


# --- Maps of the code -------------------------------------------------------------------------


def names_in(path: pathlib.Path) -> set[str]:
    """Functions, classes and methods that a file defines, and variables at its top level."""
    tree = ast.parse(path.read_text())
    defined = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in ast.walk(tree) if isinstance(node, defined)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("page", "at_least"), [("README.md", 15), ("docs/architecture.md", 30)])
def test_every_function_on_the_map_exists(page, at_least):
    found = set(re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / page).read_text()))
    assert len(found) >= at_least
    missing = {(f, n) for f, n in found if not (PACKAGE / f).exists()}
    missing |= {(f, n) for f, n in found - missing if n not in names_in(PACKAGE / f)}
    assert not missing


def test_the_picture_and_table_of_the_packages_are_up_to_date():
    assert layout.PAGE.read_text() == layout.page(), "run python docs/layout.py"
    assert layout.PICTURE.read_text() == layout.picture(), "run python docs/layout.py"


def test_the_picture_leaves_out_only_what_a_chain_of_arrows_implies():
    edges = {room: [] for room in ORDER} | {
        "config": ["errors"],
        "data": ["errors", "config"],
        "models": ["errors", "data"],
    }
    drawn = layout.reduced(edges)
    assert (drawn["config"], drawn["data"], drawn["models"]) == (["errors"], ["config"], ["data"])
