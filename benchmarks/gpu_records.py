"""What `gpu_run.py` keeps of its steps, and the tables over all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_run import DONE, MACHINE

from hip_hf.cli.publish import write_file
from hip_hf.eval.reporting.report import markdown
from hip_hf.eval.reporting.resumable import SUFFIX

# Exit statuses of a run: a number was wrong; or not every step is done.
WRONG, MISSING = 1, 3
OUT_OF_TIME, NO_TIME, FAILED = "out of time", "no time left", "failed"
# Columns of the summary; a table whose rows have none of a line's first column has its own.
COLUMNS = (
    (
        "phase",
        "batch",
        "length",
        "hip_ms",
        "sdpa_ms",
        "sdpa",
        "times_faster",
        "over_floor",
        "selecting",
        "path",
        "runs",
    ),
    ("check", "backend", "works", "error_of_allowed", "seconds"),
    ("digits", "settings", "length", "nll", "perplexity_over_dense", "read", "path"),
)
# Of a call's parts, those that take less than this share of it are not in the summary.
SMALL_PART = 0.01


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a step has measured so far: the rows of its finished measurements
    (`hip_hf/eval/reporting/resumable.py`)."""
    file = folder / f"{name}.json{SUFFIX}"
    whole = file.read_text(encoding="utf-8").split("\n")[1:-1] if file.exists() else []
    return [row for line in whole for row in json.loads(line)[1]["rows"]]


def note(folder: Path, name: str, code: int | None, seconds: float | None, limit: float) -> None:
    """Write the record of a step. `code`: its exit status, None if it was stopped; `seconds` None:
    it did not begin."""
    machine, log = folder / MACHINE, folder / f"{name}.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    states = {0: DONE, None: NO_TIME if seconds is None else OUT_OF_TIME}
    state, last = states.get(code, FAILED), text.strip().rpartition("\n")[2]
    errors = {
        DONE: "",
        NO_TIME: f"{max(limit, 0):.0f} s were left",
        OUT_OF_TIME: f"stopped after {limit:.0f} s",
    }
    record = {
        "step": name,
        "state": state,
        "error": errors.get(state, last or f"exit status {code}"),
        "seconds": seconds,
        "machine": json.loads(machine.read_text(encoding="utf-8")) if machine.exists() else None,
        "rows": rows_of(folder, name),
    }
    write_file(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    if state == DONE:
        (folder / f"{name}.json{SUFFIX}").unlink(missing_ok=True)


def records_of(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The records that there are."""
    files = [folder / f"{name}.json" for name in names]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def wrong_in(record: dict[str, Any]) -> list[str]:
    """What a step says of numbers that are not what they must be."""
    return [row["wrong"] for row in record["rows"] if row.get("wrong")]


def status(folder: Path, names: Sequence[str]) -> int:
    """The exit status of a run."""
    records = records_of(folder, names)
    if any(map(wrong_in, records)):
        return WRONG
    whole = len(records) == len(names) and all(record["state"] == DONE for record in records)
    return 0 if whole else MISSING


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows with the same keys, what the summary shows."""
    first = rows[0]
    if "test" in first:
        counts = Counter((row["test"].partition("::")[0], row["outcome"]) for row in rows)
        return [
            {"tests": file, "outcome": outcome, "number": number}
            for (file, outcome), number in counts.items()
        ]
    if "part" in first:
        whole = {(row["what"], row["length"]): row["ms"] for row in rows if row["part"] == "whole"}
        return [row for row in rows if row["ms"] >= SMALL_PART * whole[row["what"], row["length"]]]
    names = next((line for line in COLUMNS if line[0] in first), tuple(first))
    return [{name: row[name] for name in names} for row in rows]


def summary(records: Sequence[dict[str, Any]]) -> str:
    """All steps and what they have measured, in Markdown."""
    lines = []
    for record in records:
        own = {name: record[name] for name in ("step", "state", "seconds", "error")}
        lines.append({**own, "rows": len(record["rows"]), "wrong": len(wrong_in(record))})
    parts = [
        markdown(lines),
        *(f"WRONG: {record['step']}: {wrong}" for record in records for wrong in wrong_in(record)),
    ]
    for record in records:
        tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in record["rows"]:
            tables.setdefault(tuple(row), []).append(row)
        parts += [f"{record['step']}:\n\n{markdown(shown(rows))}" for rows in tables.values()]
    return "\n\n".join(parts)


def summarise(folder: Path, names: Sequence[str]) -> str:
    """Write `summary.json`, all records, and `summary.md`; return the table of the steps, which
    comes first in it."""
    records = records_of(folder, names)
    write_file(folder / "summary.json", json.dumps({"steps": records}, indent=1) + "\n")
    text = summary(records)
    write_file(folder / "summary.md", text + "\n")
    return text.partition("\n\n")[0]
