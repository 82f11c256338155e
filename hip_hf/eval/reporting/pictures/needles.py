"""The picture of `hip-hf needles`: digits right against keys read."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.report import AT


def draw(document: dict[str, Any], file: Path) -> None:
    """Digits right against the share of keys read: a line over the budgets for each setting, length and document; dense
    attention is a level."""
    plt = plots.pyplot()
    rows, configs = document["rows"], document["configs"]
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    lines: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["settings"].partition(AT)[0], row["length"], row["document"]), []).append(row)
    for i, ((name, length, text), own) in enumerate(lines.items()):
        style = dict(color=f"C{i % 10}", label=fill(f"{name}, {plots.short(length)}, {text}", 44))
        if configs[own[0]["settings"]]["method"] == "dense":
            axis.axhline(own[0]["digits"], linewidth=1, linestyle=":", **style)
        else:
            points = sorted((row["read"], row["digits"]) for row in own)
            axis.plot(*zip(*points, strict=True), marker="o", **style)
    axis.set(xlabel="share of keys read", ylabel="digits right", ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(fill(document["title"], 100), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
