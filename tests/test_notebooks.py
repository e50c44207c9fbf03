"""Every notebook runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.processes import python

FIRST, *OTHERS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

CELLS = """
import os, sys
from pathlib import Path
import matplotlib, nbformat
from IPython.core.interactiveshell import InteractiveShell

notebook = nbformat.read(sys.argv[1], as_version=4)
os.chdir(sys.argv[2])
matplotlib.use("Agg")
shell = InteractiveShell.instance()
for cell in notebook.cells:
    if cell.cell_type == "code":
        shell.run_cell(cell.source).raise_error()
print("to the bottom")
"""


@pytest.mark.parametrize("path", [FIRST, *OTHERS], ids=lambda path: path.stem)
def test_notebook_opens_in_colab(path: Path) -> None:
    """A badge that leads to this notebook, and a first cell that installs the package where it is missing."""
    title, install, *_ = nbformat.read(path, as_version=4).cells
    badge = re.match(r"\[!\[Open in Colab\]\(\S+\)\]\(\S+/blob/main/(\S+)\)\n\n# ", title.source)
    assert badge is not None
    assert badge[1] == f"notebooks/{path.name}"
    assert "import bvpo_stats\nexcept ImportError" in install.source
    assert "%pip install" in install.source


@pytest.mark.slow
def test_the_first_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    """As a reader, and `make notebooks`, run them."""
    notebook = nbformat.read(FIRST, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Cell by cell in IPython, without the ten seconds that starting a kernel takes."""
    done = python("-c", CELLS, path, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.endswith("to the bottom\n")
