"""Runs the notebooks again and keeps their outputs light: no progress bars, no warnings, no long text beside a table.

    python notebooks/execute.py                       # all of them; make notebooks
    python notebooks/execute.py notebooks/03_*.ipynb
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def light(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output as it is kept; None for none of it."""
    if output.get("name") == "stderr":
        return None
    data = output.get("data", {})
    if "text/html" in data:
        data["text/plain"] = f"<{data['text/plain'].partition('(')[0]}>"
    return output


def execute(path: Path) -> None:
    """Runs one notebook in a folder of its own and writes it back."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := light(output)) is not None]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(str(path) for path in Path(__file__).parent.glob("*.ipynb")):
        print(name, flush=True)
        execute(Path(name))
