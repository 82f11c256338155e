"""One style for what the commands print: a table for people, or one JSON document with machine and
versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import hip_hf

# Joins the name of a setting and its budget where there are several budgets.
AT = " @ "
# Columns of a table that no terminal shows (a file, a pipe): enough for all of it.
WIDE = 1000
# Progress and notes go to the error stream, so that `--json` on the output stream stays one
# document.
notes = Console(stderr=True)


def grouped(
    rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> dict[Any, list[dict[str, Any]]]:
    """The rows by what `key` says of them, in their order."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return {
        "cpu": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers")},
        "hip_hf": hip_hf.__version__,
    }


def progress() -> Progress:
    """A progress bar on the error stream."""
    numbers = MofNCompleteColumn(), TimeElapsedColumn()
    columns = TextColumn("{task.description}"), BarColumn(), *numbers
    return Progress(*columns, console=notes, transient=True)


def note(line: str, **style: Any) -> None:
    """A line on the error stream as it is: not broken, nothing in it taken for markup."""
    notes.print(line, highlight=False, markup=False, soft_wrap=True, **style)


@contextmanager
def counting(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress bar of one line. What it gives is called with how many steps are done, 1 if
    nothing is said."""
    with progress() as bar:
        yield partial(bar.advance, bar.add_task(what, total=total))


def show(title: str, rows: Sequence[dict[str, Any]], as_json: bool, **extra: Any) -> None:
    """Print rows (dicts with the same keys) as a table, or everything as JSON."""
    if as_json:
        document = {"title": title, "rows": list(rows), **extra, "machine": machine()}
        print(json.dumps(document, indent=1))
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        words = isinstance(rows[0][name], str)
        table.add_column(name.replace("_", " "), justify="left" if words else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    for name, value in extra.items():
        console.print(f"{name.replace('_', ' ')}: {cell(value)}", highlight=False)


def markdown(rows: Sequence[dict[str, Any]], *names: str) -> str:
    """Rows as a table in Markdown; `names`: these columns only."""
    names = names or tuple(rows[0])
    lines = [
        [name.replace("_", " ") for name in names],
        ["---"] * len(names),
        *([cell(row[name]) for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
