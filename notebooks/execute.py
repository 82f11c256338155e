"""Executes notebooks: `python notebooks/execute.py [NAME ...]` saves the outputs of all, or of the
named ones, in place."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds for a cell


def execute(file: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in an empty folder. Raises
    `nbclient.exceptions.CellExecutionError` if a cell fails."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=TIMEOUT, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # execution times differ from run to run
        if cell.cell_type == "code":
            # progress bars are for those who wait
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return notebook


if __name__ == "__main__":
    for file in sorted(HERE.glob("*.ipynb")):
        if not sys.argv[1:] or file.stem in sys.argv[1:]:
            start = time.perf_counter()
            nbformat.write(execute(file), file)
            print(f"{file.name}: {time.perf_counter() - start:.0f} s")
