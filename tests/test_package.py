"""The package as a user installs it: what the wheel holds, and all commands in an empty folder."""

import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import conftest
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DATA = [
    "vit_at/py.typed",
    "vit_at/reporting/packaged/report.html",
    "vit_at/reporting/packaged/published.json",
    "vit_at/reporting/packaged/flags.json",
    "vit_at/data/packaged/digits/1.0.0/digits-train.array_record-00000-of-00001",
    "vit_at/reporting/packaged/load.py",
    "vit_at/workdir/packaged/digits_deit_64x2/model.safetensors",
    "vit_at/configs/digits_sgd.py",
    "vit_at/configs/study/masking.py",
]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_of_the_tree_is_installed():
    def packages(folder, name):
        for path in folder.rglob("__init__.py"):
            yield ".".join((name, *path.parent.relative_to(folder).parts))

    found = {*packages(ROOT / "vit_at", "vit_at"), *packages(ROOT / "configs", "vit_at.configs")}
    assert set(setup_cfg()["options"]["packages"].split()) == found


def test_a_checkout_that_is_not_installed_says_so(tmp_path):
    (tmp_path / "vit_at").symlink_to(ROOT / "vit_at")
    # Isolated from this environment's packages, so from the installed configs, too.
    code = f"import sys; sys.path.append('{tmp_path}'); import vit_at"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: vit_at is on Python's path, but not installed: run "
        "'pip install -e .' in its checkout"
    )


def test_the_paths_that_are_type_checked_exist():
    files = setup_cfg()["mypy"]["files"].replace(",", " ").split()
    assert files
    for file in files:
        assert (ROOT / file).exists(), file


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(wheel, Python of a new environment that has it and, by a path file, its dependencies)."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in ("vit_at", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", ".", "-w", folder], cwd=source, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    # Path files in these folders are not read, so an editable install of the checkout isn't seen.
    (own / "dependencies.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    return wheel, python


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """``run(command, *arguments)`` -> what the installed command prints in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(conftest.CACHE)

    def started(command, *arguments):
        words = [str(installed[1].parent / command), *arguments]
        ended = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    started.folder = folder
    return started


@pytest.fixture(scope="module")
def workdir(run):
    """A run that the installed command has trained."""
    assert "pgd-2" in run("vit-at", "train", "digits_sgd:smoke")
    return run.folder / "runs" / "digits_sgd-smoke"


@pytest.mark.slow
def test_the_wheel_holds_recipes_and_data(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    assert names.issuperset(DATA)
    assert not any(name.startswith(("tests", "configs", "launch")) for name in names)


@pytest.mark.slow
def test_every_command_works_outside_of_a_checkout(run, workdir):
    assert json.loads((workdir / "config.json").read_text())["name"] == "digits_sgd-smoke"
    assert (workdir / "report" / "index.html").stat().st_size > 10_000
    options = ["--attacks=clean,pgd-1", "--num_examples=16"]
    assert "pgd-1" in run("vit-at", "evaluate", "runs/digits_sgd-smoke", *options)
    assert "page.html" in run("vit-at", "report", "runs/digits_sgd-smoke", "--out=page.html")
    assert "model.safetensors" in run("vit-at", "export", "runs/digits_sgd-smoke")
    assert "clean" in run("vit-at", "evaluate", f"{workdir}/export", "--attacks=clean")
    assert "Ready in" in run("vit-at", "prepare", "digits")
    assert "study/masking" in run("vit-at", "recipes")
    assert "deit_tiny_patch16_224" in run("vit-at", "models")
    assert "digits_deit_64x2" in run("vit-at", "models", "--robust")
    assert "clean" in run("vit-at", "evaluate", "digits_deit_64x2", "--attacks=clean")
    assert "digits_sgd" in run("vit-at", "--print-completion=bash")
    assert run("vit-at", "--version") == run("python", "-m", "vit_at", "--version")
    assert "--config.FIELD=VALUE" in run("python", "-m", "vit_at.main", "--help")


LIBRARY = """
import jax, numpy as np
import vit_at
from etils import epath
from vit_at import configs

model = vit_at.create("deit_tiny_patch16_224", num_classes=3, image_size=8, patch_size=2,
                      embed_dim=8, depth=2, num_heads=2)
apply = vit_at.classifier(model, (0.5,) * 3, (0.5,) * 3)
images, labels = np.random.default_rng(0).random((4, 8, 8, 3), np.float32), np.arange(4) % 3
params = model.init(jax.random.key(0), images)["params"]
logits_fn = lambda x: apply(params, x)
threat = vit_at.Threat(eps=0.1, step_size=0.05, steps=2)
attacked = vit_at.pgd_attack(logits_fn, images, labels, jax.random.key(1), threat)
assert 0 < np.abs(attacked - images).max() <= 0.1 + 1e-6
result = vit_at.autoattack.run(logits_fn, images, labels, eps=0.1, attacks="apgd-ce", batch_size=4)
assert len(result.summary()) > 10
records = vit_at.evaluate("runs/digits_sgd-smoke", attacks="clean", num_examples=16)
assert [record["attack"] for record in records] == ["clean"]
config = configs.load("digits_sgd:smoke")
records = vit_at.train(config, epath.Path("runs/digits_sgd-smoke"))  # finished: only read back
assert [record["attack"] for record in records] == ["clean", "cw-2", "pgd-2"]
print(vit_at.__file__)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("workdir")
def test_the_library_works_outside_of_a_checkout(run, installed):
    (file,) = run("python", "-c", LIBRARY).splitlines()
    assert installed[1].parents[1] in pathlib.Path(file).parents
