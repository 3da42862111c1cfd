"""The order of the rooms: a file imports only from above its own room, within it one way."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "vit_at"
# From the top down; the files directly in vit_at/ that are no room's stand at their place.
ORDER = [
    "errors",
    "config",
    "console",
    "distributed",
    "data",
    "models",
    "weights",
    "workdir",
    "attacks",
    "attacks.autoattack",
    "evaluation",
    "training",
    "reporting",
    "commands",
]
LIBRARY_FILES = {"errors", "config", "console"}


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    package = module.rpartition(".")[0]
    return package or (module if module in LIBRARY_FILES else "commands")


def imported(path: pathlib.Path) -> set[str]:
    """The package's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        found |= {name.removeprefix("vit_at.") for name in names if name.startswith("vit_at.")}
    modules = {name for name in found if (PACKAGE / f"{name.replace('.', '/')}.py").exists()}
    packages = {n for n in found if (PACKAGE / n.replace(".", "/") / "__init__.py").exists()}
    return modules | {f"{name}.__init__" for name in packages}


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imported(path) - {name} for name, path in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_rooms_above_its_own(name):
    own = ORDER.index(room_of(name))
    below = {other for other in IMPORTS[name] if ORDER.index(room_of(other)) > own}
    if name.endswith("__init__"):  # a package's front door may show what a room inside it has
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


def loaded_by(entry: str, packages: set[str]) -> str:
    """Those of the packages that importing an entry point loads, as text."""
    code = f"import sys, vit_at.{entry}; print({packages} & sys.modules.keys())"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ended.stdout.strip()


@pytest.mark.parametrize("entry", ["main", "evaluate", "export", "report"])
def test_the_training_command_imports_neither_tensorflow_nor_torch(entry):
    assert loaded_by(entry, {"tensorflow", "torch"}) == "set()"


def test_training_does_not_wait_for_what_only_the_report_needs():
    assert loaded_by("main", {"matplotlib", "jinja2"}) == "set()"
