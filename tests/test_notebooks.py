"""Every notebook runs from top to bottom and shows its pictures."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a machine with ten other things to do still finishes
@pytest.mark.filterwarnings("default")  # Jupyter's own; those of the notebook's code come in its kernel, not here
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs_and_draws(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the kernel: another worker has the other core
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": tmp_path}}).execute()
    drawing = re.compile(r"plt\.subplots|\.figure\(\)|^plot_(schedule|batch)\(", re.M)
    drawn = sum(cell.cell_type == "code" and bool(drawing.search(cell.source)) for cell in notebook.cells)
    assert drawn
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == drawn
