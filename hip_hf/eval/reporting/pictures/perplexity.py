"""The picture of `hip-hf perplexity`: perplexity by position."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting import plots


def draw(document: dict[str, Any], file: Path) -> None:
    """Perplexity of each range of positions, a line per setting."""
    plt = plots.pyplot()
    rows = document["rows"]
    whole = max(row["to"] for row in rows)
    parts = [row for row in rows if (row["from"], row["to"]) != (0, whole)] or rows
    ranges = sorted({(row["from"], row["to"]) for row in parts})
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for name in dict.fromkeys(row["settings"] for row in parts):
        own = {(row["from"], row["to"]): row for row in parts if row["settings"] == name}
        heights = [own[span]["perplexity"] for span in ranges]
        bars = [[abs((own[span][side] or height) - height) for span, height in zip(ranges, heights, strict=True)]
                for side in ("low", "high")]  # fmt: skip
        axis.errorbar(range(len(ranges)), heights, yerr=bars, marker="o", capsize=3, label=fill(name, 44))
    axis.set_xticks(range(len(ranges)), [f"{plots.short(start)} to {plots.short(end)}" for start, end in ranges])
    axis.set_xlabel("position in the text (tokens)")
    axis.set_ylabel("perplexity, with the 95 % interval")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title("\n".join(fill(line, 100) for line in document["title"].split("\n")), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
