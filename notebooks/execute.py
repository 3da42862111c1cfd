"""Runs the notebooks and stores their outputs, light enough to be read on the web.

    python notebooks/execute.py [NAME ...]

A notebook runs in an empty folder, into which its first cell clones the last commit of this
checkout. Stored are text and pictures; reports are left out, as GitHub does not show frames.
"""

import configparser
import os
import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SETUP = configparser.ConfigParser()
_SETUP.read(ROOT / "setup.cfg")
URL = _SETUP["metadata"]["url"]
LEFT_OUT = "(the report, shown when the notebook runs)"


def execute(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> None:
    """Runs all cells in a folder; what the first one installs goes there, too."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    written, first.source = first.source, first.source.replace(URL, ROOT.as_uri())
    # The packages that vit_at needs are those of this Python.
    env = {
        "PIP_TARGET": str(folder / "site"),
        "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where)
    client.execute(env=os.environ | env)
    first.source = written


def make_light(notebook: nbformat.NotebookNode) -> None:
    """Drops the installation's output, frames, and what differs from one execution to the next."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "install" in cell.metadata.get("tags", ()):
            cell.outputs = []
        for output in cell.get("outputs", ()):
            if "<iframe" in output.get("data", {}).get("text/html", ""):
                output.data = {"text/plain": LEFT_OUT}


def main() -> None:
    names = sys.argv[1:] or [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for name in names:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, pathlib.Path(folder))
        make_light(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
