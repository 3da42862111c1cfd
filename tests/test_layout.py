"""The order of dependencies: a file imports only from above it."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "vit_at"

# From the top down; files of one line don't import each other.
ORDER = [
    ["config", "runtime", "__init__"],
    ["meeting", "command_line", "pictures"],
    ["processes"],
    ["sharding", "workdir"],
    ["metrics", "data.backends", "data.augment", "data.__init__"],
    ["data.sources", "prepare"],
    ["data.pipeline"],
    ["models.ops"],
    ["models.layers"],
    ["models.vit", "models.convit", "models.swin"],
    ["models.__init__"],
    ["models.build", "explain"],
    ["weight_files", "weight_adaptation"],
    ["weights"],
    ["attacks.threat", "attacks.losses"],
    ["attacks.pgd", "attacks.apgd"],
    ["attacks.fab", "attacks.square"],
    ["attacks.methods", "attacks.ledger", "attacks.checks"],
    ["attacks.packing"],
    ["attacks.cascade"],
    ["attacks.autoattack"],
    ["attacks.audit"],
    ["attacks.__init__"],
    ["masking", "objectives", "optim"],
    ["train_step"],
    ["checkpoint"],
    ["results"],
    ["model_card"],
    ["export", "autoattack_evaluation"],
    ["study", "exhibits"],
    ["sweep", "charts"],
    ["report"],
    ["evaluate"],
    ["scaling"],
    ["setup"],
    ["train"],
    ["main"],
]
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name.replace('.', '/')}.py").exists()


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
        for name in names:
            head, _, inner = name.partition(".")
            if head == "vit_at":
                found |= {inner, f"{inner}.__init__"} if inner else {"__init__"}
    return {name for name in found if is_module(name)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_a_file_imports_only_from_above_it(path):
    name = name_of(path)
    assert name in RANK, f"give vit_at/{name} its place in ORDER"
    upward = {other for other in imported(path) - {name} if RANK[other] >= RANK[name]}
    if name.endswith(".__init__"):  # a submodule's package counts as imported with it
        upward = {o for o in upward if not o.startswith(name.removesuffix("__init__"))}
    else:
        parent = f"{name.rpartition('.')[0]}.__init__"
        upward -= {parent}
    assert not upward


def test_the_reader_of_imports_finds_those_there_are():
    assert {"config", "train", "command_line", "results"} <= imported(PACKAGE / "main.py")
    assert "attacks.__init__" in imported(PACKAGE / "evaluate.py")


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
