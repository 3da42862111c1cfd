"""The notebooks hold no outputs, and run from their first to their last cell."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: pathlib.Path, parameters: str = "") -> nbformat.NotebookNode:
    """Runs a notebook without its installation, with other parameters."""
    notebook = nbformat.read(path, as_version=4)
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
    notebook.cells = [cell for cell in notebook.cells if cell is not tagged.get("install")]
    if parameters:
        tagged["parameters"].source += f"\n{parameters}"
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    return client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})


def text_of(notebook: nbformat.NotebookNode) -> str:
    """Everything that its cells have shown."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "\n".join(out.get("text", "") + str(out.get("data", "")) for out in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_quickstart_trains_attacks_and_exports(tmp_path):
    quick = f'EPOCHS, ATTACKED, VERSION, RUNS = 2, 4, ["apgd-ce"], "{tmp_path}/runs"'
    shown = text_of(execute(ROOT / "notebooks" / "quickstart.ipynb", quick))
    assert "| AT | 1 |" in shown
    assert "| natural | 1 |" in shown
    assert shown.count("<iframe srcdoc=") == 2
    assert "apgd-ce" in shown
    assert "deit_tiny_patch16_224" in shown
    assert (tmp_path / "runs" / "at" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_recipes_are_drawn_from_committed_results():
    shown = text_of(execute(ROOT / "notebooks" / "recipes.ipynb"))
    assert "AT + ARD + PRM" in shown
    assert shown.count("<iframe srcdoc=") == 3
