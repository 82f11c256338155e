"""The tables of measured figures that the pages show, from the saved results.

`python docs/tables.py` prints them all, each below the name of its page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hip_hf.config import HiPConfig

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
Rows = list[dict[str, Any]]
# What is called by another name than its settings.
TITLES = {
    "dense": "dense",
    "{}": "`hip` (defaults)",
    "defaults": "`hip` (defaults)",
    "paper": "HiP as published (`paper`)",
    "delta": "`hip` with Delta correction (`delta`)",
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
    rows = [f"| {' | '.join(cells)} |" for cells in (columns, *lines)]
    return "\n".join([rows[0], "|---" * len(columns) + "|", *rows[1:]]) + "\n"


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
        ValueError: there is none.
    """
    found = [row for row in rows if row["settings"] == settings]
    if not found:
        raise ValueError(f"benchmarks/results: measure {settings!r} as well, which a page shows")
    return found


def answers() -> str:
    """Answers of the real model, of both documents and lengths, as the README shows them."""
    lines = []
    for length, *files in (
        (4096, "needles_4k", "needles_code_4k"),
        (8192, "needles", "needles_code"),
    ):
        for settings, name in ANSWERS.items():
            rows = [row for file in files for row in named(read(file)["rows"], settings)]
            both = lambda key, rows=rows: " / ".join(number(row[key]) for row in rows)  # noqa: E731
            dense = settings == "dense"
            lines.append(
                [
                    f"{length:,}, {name}",
                    " / ".join(row["document"] for row in rows),
                    percent(rows[0]["read"]),
                    both("digits"),
                    " / ".join(number(row["answers_right"], 2) for row in rows),
                    both("nll"),
                    "" if dense else both("perplexity_over_dense"),
                    number(rows[0]["selection_over_attention"], 2),
                ]
            )
    columns = ["tokens, settings", "document", "keys read", "digits right", "answers right"]
    columns += ["digits' NLL", "perplexity, times dense", "selection / attention"]
    return table(columns, lines)


def needles(*files: str) -> str:
    """Answers of the real model by settings, of both documents, which are in one file or in two."""
    rows = [row for file in files for row in read(file)["rows"]]
    lines = []
    for settings in dict.fromkeys(row["settings"] for row in rows):
        some = {row["document"]: row for row in named(rows, settings)}
        pairs = [
            " / ".join(number(some[document][key]) for document in ("novel", "code"))
            for key in ("digits", "nll", "perplexity_over_dense")
        ]
        one = some["novel"]
        cost = number(one["selection_over_attention"], 2)
        lines.append([title(settings), percent(one["read"]), *pairs, cost])
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


def looked_up(part: str) -> str:
    """What selections keep of that which answers look up, by `settings`, or by the `estimates` of a
    row's need."""
    lines = []
    for row in read("lookups")[part]:
        found = [number(row[key]) for key in ("facts", "lost", "missed")]
        if part == "settings":
            lines.append([title(row["settings"]), *found, number(row["cost"], 2)])
        else:
            lines.append([row["estimate"], str(row["keys"]), *found])
    found = ["facts", "lost", "missed"]
    if part == "settings":
        return table(["settings", *found, "selection / attention"], lines)
    return table(["need by", "keys a row", *found], lines)


def side_by_side() -> str:
    """Every method on the demo checkpoint, at two budgets."""
    document = read("methods")
    rows = {row["settings"]: row for row in document["rows"]}
    names = dict.fromkeys(name.partition(" @ ")[0] for name in rows if " @ " in name)
    figures = {"mass": 3, "error": 3, "cost": 2, "bytes_share": 2, "ratio": 3}
    lines = [
        [
            title(name),
            *(
                " / ".join(number(rows[f"{name} @ {budget}"][key], digits) for budget in (256, 512))
                for key, digits in figures.items()
            ),
        ]
        for name in names
    ]
    return table(["method", "mass", "output error", "FLOPs", "bytes", "perplexity"], lines)


def call_speed(name: str) -> str:
    """How many times faster than PyTorch's attention one call is, by its length."""
    rows = read(name)["rows"]
    lengths = sorted({row["length"] for row in rows})
    found = {(row["phase"], row["settings"], row["length"]): row["times_faster"] for row in rows}
    kinds = {
        "prefill, defaults / beam1": [("prefill", "defaults"), ("prefill", "beam1")],
        "decode, defaults, amortised / refreshed each step": [
            ("decode amortised", "defaults"),
            ("decode refreshed", "defaults"),
        ],
    }
    lines = [
        [
            kind,
            *(
                " / ".join(number(found[(*cell, length)], 1) for cell in cells)
                for length in lengths
            ),
        ]
        for kind, cells in kinds.items()
    ]
    return table(["", *(f"{length >> 10}K" for length in lengths)], lines)


def two_checkouts() -> str:
    """The speed of the present defaults over that of earlier ones."""
    rows = read("two_checkouts")["rows"]
    lengths = sorted({row["length"] for row in rows})
    ratios = {(row["phase"], row["length"]): number(row["ratio"], 2) for row in rows}
    names = {"prefill": "prefill", "decode": "decode, a step"}
    lines = [[names[x], *(ratios[x, length] for length in lengths)] for x in names]
    return table(["", *(f"{length >> 10}K" for length in lengths)], lines)


# The page and each of its tables.
TABLES: list[tuple[str, Callable[[], str]]] = [
    ("README.md", answers),
    ("docs/methods.md", lambda: needles("needles_methods")),
    ("docs/methods.md", lambda: needles("needles_delta")),
    ("docs/methods.md", lambda: needles("needles_settings", "needles_settings_code")),
    ("docs/methods.md", lambda: needles("needles_layers")),
    ("docs/methods.md", lambda: looked_up("settings")),
    ("docs/methods.md", lambda: looked_up("estimates")),
    ("docs/methods.md", decode_steps),
    ("docs/methods.md", side_by_side),
    ("docs/measurements.md", lambda: call_speed("latency_fp32")),
    ("docs/measurements.md", lambda: call_speed("latency")),
    ("docs/measurements.md", two_checkouts),
]

if __name__ == "__main__":
    for page, make in TABLES:
        print(f"{page}\n\n{make()}")
