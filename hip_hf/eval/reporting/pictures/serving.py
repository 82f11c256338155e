"""The picture of `benchmarks/serving.py`: how long clients wait for their first token, and how many tokens they get together."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting.plots import pyplot, short

PANELS = {"first_token_s": "seconds to the first token", "tokens_per_s": "new tokens a second, of all clients"}


def draw(document: dict[str, Any], file: Path) -> None:
    """A row of panels for each length of prompts: both figures by the number of clients, a line for each attention."""
    plt = pyplot()
    rows = document["rows"]
    lengths, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("tokens", "attention"))
    size = (4.5 * len(PANELS), 0.6 + 2.8 * len(lengths))
    figure, axes = plt.subplots(len(lengths), len(PANELS), figsize=size, squeeze=False, layout="constrained")
    for length, own in zip(lengths, axes, strict=True):
        for axis, (figure_name, words) in zip(own, PANELS.items(), strict=True):
            for name in names:
                points = [
                    (row["clients"], row[figure_name]) for row in rows if (row["tokens"], row["attention"]) == (length, name)
                ]
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(title=f"prompts of {short(length)} tokens", xlabel="clients at once", ylabel=words)
            axis.set_xticks(sorted({row["clients"] for row in rows}))
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.suptitle(fill(document["title"], 100), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
