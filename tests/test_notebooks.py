"""The notebooks run from an empty folder, and hold outputs that can be read on the web."""

import importlib.util
import pathlib
import re

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000
_spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)


def execute(name: str, folder: pathlib.Path, parameters: str = "") -> nbformat.NotebookNode:
    """Runs a notebook in an empty folder, with other parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if parameters:
        tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
        tagged["parameters"].source += f"\n{parameters}"
    notebooks.execute(notebook, folder)
    assert warnings_of(notebook) == []
    return notebook


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """All outputs but the installation's."""
    cells = [c for c in notebook.cells if "install" not in c.metadata.get("tags", ())]
    return [output for cell in cells for output in cell.get("outputs", ())]


def text_of(notebook: nbformat.NotebookNode) -> str:
    """Everything that its cells have shown."""
    outputs = outputs_of(notebook)
    return "\n".join(out.get("text", "") + str(out.get("data", "")) for out in outputs)


def warnings_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines on standard error that warn."""
    written = "".join(o.text for o in outputs_of(notebook) if o.get("name") == "stderr")
    return [line for line in written.splitlines() if re.search("warning|error", line, re.I)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_light_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    shown = text_of(notebook)
    assert "image/png" in shown
    assert "<iframe" not in shown
    assert "Traceback" not in shown
    assert str(pathlib.Path.home()) not in shown
    assert warnings_of(notebook) == []
    run = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    assert not run[0].outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_and_first_cell_are_of_the_repository_that_setup_names(path):
    notebook = nbformat.read(path, as_version=4)
    owner_and_name = notebooks.URL.removeprefix("https://github.com/")
    colab = f"colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{path.name}"
    assert f"(https://{colab})" in notebook.cells[0].source
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert f"git clone -q --depth 1 {notebooks.URL} " in first.source
    assert f"(https://{colab})" in (ROOT / "docs" / "index.md").read_text()


def test_the_documentation_names_the_same_repository():
    assert f"repo_url: {notebooks.URL}\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.slow
def test_the_quickstart_trains_attacks_and_exports(tmp_path):
    quick = f'EPOCHS, ATTACKED, VERSION, RUNS = 2, 4, ["apgd-ce"], "{tmp_path}/runs"'
    shown = text_of(execute("quickstart", tmp_path, quick))
    assert "| AT | 1 |" in shown
    assert "| natural | 1 |" in shown
    assert shown.count("<iframe srcdoc=") == 2
    assert "apgd-ce" in shown
    assert "deit_tiny_patch16_224" in shown
    assert (tmp_path / "runs" / "at" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_recipes_are_drawn_from_committed_results(tmp_path):
    shown = text_of(execute("recipes", tmp_path))
    assert "AT + ARD + PRM" in shown
    assert shown.count("<iframe srcdoc=") == 3


@pytest.mark.slow
def test_autoattack_runs_on_a_flax_model_of_ones_own(tmp_path):
    shown = text_of(execute("autoattack", tmp_path))
    assert "square" in shown
    robust = [float(x) for x in re.findall(r"(?:clean|square) +([\d.]+)%", shown)]
    assert 90 < robust[0] <= 100
    assert robust[1] < robust[0] - 20
