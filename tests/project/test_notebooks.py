"""The notebooks run as they are, and were saved with their outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from repository import ROOT

if not os.environ.get("CI"):  # where they must have run
    pytest.importorskip("nbclient", reason="pip install '.[test]'")
    pytest.importorskip("ipykernel", reason="pip install '.[test]'")

import nbformat

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "notebooks"))

from execute import execute  # noqa: E402


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def test_there_are_five() -> None:
    assert [file.stem[:1] for file in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own assertions hold; and what it was saved with has the same kinds of outputs, none of
    them an error."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fresh, saved = outputs(execute(file)), outputs(nbformat.read(file, as_version=4))
    assert fresh
    assert [out.output_type for out in saved] == [out.output_type for out in fresh]
    assert "error" not in {out.output_type for out in saved}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_asserts_and_is_small(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    assert any("assert " in cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert file.stat().st_size < 2**20
