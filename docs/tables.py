"""The tables of measured figures that the pages show, from the saved results.

`python docs/tables.py` prints them all, each below the name of its page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hip_hf.config import HiPConfig
from hip_hf.eval.reporting.report import markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
Rows = list[dict[str, Any]]
# What is called by another name than its settings.
TITLES = {
    "dense": "dense",
    "{}": "`hip` (defaults)",
    "defaults": "`hip` (defaults)",
    "paper": "HiP as published (`paper`)",
    "delta": "`hip` with Delta correction (`delta`)",
    "quality": "`hip`, `query_stride=1, beam=16, rescore=16` (`quality`)",
    "true_need": "`hip`, need by all keys (`true_need`)",
    "streaming+delta": "`streaming` with Delta correction",
}
# The rows of the README's table, as the results name them.
ANSWERS = {
    "dense": "dense",
    f"defaults @ {HiPConfig.budget}": f"defaults (`budget={HiPConfig.budget}`)",
    "defaults @ 256": "`budget=256`",
}


def read(name: str) -> dict[str, Any]:
    """A saved result."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def table(columns: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return markdown([dict(zip(columns, line, strict=True)) for line in lines]) + "\n"


def title(settings: str) -> str:
    """What a table calls settings that the results name `settings`."""
    return TITLES.get(settings, f"`{settings}`")


def number(value: float | None, digits: int = 3) -> str:
    """A figure; empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def named(rows: Rows, settings: str) -> Rows:
    """The rows of these settings, one for each document.

    Raises:
        ValueError: there is none, or there are several of a document.
    """
    found = [row for row in rows if row["settings"] == settings]
    if not found or len({row["document"] for row in found}) < len(found):
        raise ValueError(
            f"benchmarks/results: got {len(found)} rows of {settings!r}, "
            "allowed: one for each document, measured for a page that shows it"
        )
    return found


def both(rows: Rows, key: str, digits: int = 3) -> str:
    """A figure of several rows."""
    return " / ".join(number(row[key], digits) for row in rows)


def answers() -> str:
    """Answers of the real model, of both documents and lengths, as the README shows them."""
    lines = []
    for length, *files in (
        (4096, "needles_4k", "needles_code_4k"),
        (8192, "needles", "needles_code"),
    ):
        measured = [read(file)["rows"] for file in files]
        for settings, name in ANSWERS.items():
            rows = [row for some in measured for row in named(some, settings)]
            documents = " / ".join(row["document"] for row in rows)
            cells = [f"{length:,}, {name}", documents, percent(rows[0]["read"])]
            cells += [both(rows, "digits"), both(rows, "answers_right", 2), both(rows, "nll")]
            cells += ["" if settings == "dense" else both(rows, "perplexity_over_dense")]
            lines.append([*cells, number(rows[0]["selection_over_attention"], 2)])
    columns = ["tokens, settings", "document", "keys read", "digits right", "answers right"]
    columns += ["digits' NLL", "perplexity, times dense", "selection / attention"]
    return table(columns, lines)


def needles(*files: str) -> str:
    """Answers of the real model by settings, of the novel and of code, which are in one file or in
    two."""
    every = [row for file in files for row in read(file)["rows"]]
    lines = []
    for settings in dict.fromkeys(row["settings"] for row in every):
        rows = named(every, settings)
        if [row["document"] for row in rows] != ["novel", "code"]:
            raise ValueError(f"{files}: got one document of {settings!r}, allowed: novel and code")
        cells = [title(settings), percent(rows[0]["read"])]
        cells += [both(rows, key) for key in ("digits", "nll", "perplexity_over_dense")]
        lines.append([*cells, number(rows[0]["selection_over_attention"], 2)])
    columns = ["", "keys read", "digits right, novel / code", "digits' NLL"]
    return table([*columns, "perplexity, times dense", "selection / attention"], lines)


def decode_steps() -> str:
    """Answers of the real model, computed token by token, by how long a selection serves."""
    lines = []
    for row in read("needles_decode")["rows"]:
        settings, _, budget = row["settings"].partition(" @ ")
        name = f"{title(settings)}, budget {budget}" if budget else title(settings)
        lines.append([name, percent(row["read"]), number(row["digits"]), number(row["nll"])])
    return table(["", "keys read", "digits right", "digits' NLL"], lines)


# What `benchmarks/lookups.py` measures of a selection.
LOOKUPS = ("facts", "lost", "missed")


def looked_up_by_settings() -> str:
    """What selections keep of that which answers look up, by settings."""
    lines = [
        [title(row["settings"]), *(number(row[key]) for key in LOOKUPS), number(row["cost"], 2)]
        for row in read("lookups")["settings"]
    ]
    return table(["settings", *LOOKUPS, "selection / attention"], lines)


def looked_up_by_estimates() -> str:
    """The same by the estimate of a row's need."""
    lines = [
        [row["estimate"], str(row["keys"]), *(number(row[key]) for key in LOOKUPS)]
        for row in read("lookups")["estimates"]
    ]
    return table(["need by", "keys a row", *LOOKUPS], lines)


def side_by_side() -> str:
    """Every method on the demo checkpoint, at two budgets."""
    rows = {row["settings"]: row for row in read("methods")["rows"]}
    names = dict.fromkeys(name.partition(" @ ")[0] for name in rows if " @ " in name)
    figures = {"mass": 3, "error": 3, "cost": 2, "bytes_share": 2, "ratio": 3}
    lines = []
    for name in names:
        pair = [rows[f"{name} @ {budget}"] for budget in (256, 512)]
        lines.append([title(name), *(both(pair, key, digits) for key, digits in figures.items())])
    return table(["method", "mass", "output error", "FLOPs", "bytes", "perplexity"], lines)


def by_length(rows: Rows, key: str, *names: str) -> tuple[list[int], dict[tuple[str, ...], float]]:
    """The lengths of `rows`, and their figure `key` by the columns `names` and the length.

    Raises:
        ValueError: two rows are of the same.
    """
    found = {(*(row[name] for name in names), row["length"]): row[key] for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"rows: got several of the same {names} and length, allowed: one")
    return sorted({row["length"] for row in rows}), found


def call_speed(name: str) -> str:
    """How many times faster than PyTorch's attention one call is, by its length; and how the time
    of a prompt grows, in brackets that of PyTorch's."""
    document = read(name)
    lengths, found = by_length(document["rows"], "times_faster", "phase", "settings")
    grows = [f"T^{number(one['hip'], 2)}" for one in document["exponents"]]
    growth = f"{' / '.join(grows)} (T^{number(document['exponents'][0]['sdpa'], 2)})"
    kinds = {
        "prefill, defaults / beam1": [("prefill", "defaults"), ("prefill", "beam1")],
        "decode, defaults, amortised / refreshed each step": [
            ("decode amortised", "defaults"),
            ("decode refreshed", "defaults"),
        ],
    }
    lines = []
    for kind, cells in kinds.items():
        pairs = [[number(found[(*cell, length)], 1) for cell in cells] for length in lengths]
        grows_as = growth if kind.startswith("prefill") else ""
        lines.append([kind, *map(" / ".join, pairs), grows_as])
    return table(["", *(f"{length >> 10}K" for length in lengths), "time grows as"], lines)


def two_checkouts() -> str:
    """The speed of the present defaults over that of earlier ones."""
    lengths, found = by_length(read("two_checkouts")["rows"], "ratio", "phase")
    names = {"prefill": "prefill", "decode": "decode, a step"}
    lines = [[name, *(number(found[x, n], 2) for n in lengths)] for x, name in names.items()]
    return table(["", *(f"{length >> 10}K" for length in lengths)], lines)


# The page and each of its tables.
TABLES: list[tuple[str, Callable[[], str]]] = [
    ("README.md", answers),
    ("docs/methods.md", lambda: needles("needles_methods")),
    ("docs/methods.md", lambda: needles("needles_quest")),
    ("docs/methods.md", lambda: needles("needles_delta")),
    ("docs/methods.md", lambda: needles("needles_settings", "needles_settings_code")),
    ("docs/methods.md", lambda: needles("needles_layers")),
    ("docs/methods.md", looked_up_by_settings),
    ("docs/methods.md", looked_up_by_estimates),
    ("docs/methods.md", decode_steps),
    ("docs/methods.md", side_by_side),
    ("docs/measurements.md", lambda: call_speed("latency_fp32")),
    ("docs/measurements.md", lambda: call_speed("latency")),
    ("docs/measurements.md", two_checkouts),
]

if __name__ == "__main__":
    for page, make in TABLES:
        print(f"{page}\n\n{make()}")
