"""`hip-hf memory`: the rows it measures, and what it makes of them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hip_hf.eval import memory

COLUMNS = {"cache", "length", "bytes_per_token", "resident_MiB", "peak_MiB", "device_MiB"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own for each row: what is measured then includes the tests' memory, but all of it is real."""
    pool = SimpleNamespace(apply=lambda function, arguments: function(*arguments))
    context = SimpleNamespace(Pool=lambda size: nullcontext(pool))
    monkeypatch.setattr(memory, "multiprocessing", SimpleNamespace(get_context=lambda kind: context))


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(memory.main)
    return CliRunner().invoke(app, arguments)


def test_rows_table_json_and_plot(tmp_path: Path) -> None:
    """At a length that is no multiple of a page, or of a chunk, and where an eighth of it is less than a step needs."""
    plot, output = tmp_path / "memory.png", tmp_path / "memory.json"
    done = run("--lengths", "5000", "--plot", str(plot), "--output", str(output))
    assert done.exit_code == 0, done.output
    rows = json.loads(output.read_text())["rows"]
    assert [row["cache"] for row in rows] == list(memory.KINDS)
    assert all(set(row) == COLUMNS and row["length"] == 5000 for row in rows)
    for kind in memory.KINDS:
        assert kind in done.output
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_offloaded_cache_has_its_pools_and_summaries_on_the_device() -> None:
    pages, heads, dim, layers = 16, 2, 64, 4  # an eighth of 128 pages, and as many blocks as a step selects
    found = memory.measure("hip offloaded", str(memory.CHECKPOINT), 8192)["device_MiB"] * 2**20
    pools = 3 * layers * heads * pages * 64 * dim * 4  # keys, values, searched keys; fp32
    blocks = (8192 - 512) // 16  # up to the window
    summaries = sum(blocks >> level for level in range(blocks.bit_length())) * layers * heads * 2 * dim * 4
    assert pools + summaries <= found <= pools + 2 * summaries  # tables may have room to grow


def test_bad_lengths_are_refused() -> None:
    assert run("--lengths", "many").exit_code != 0
