"""The picture of `benchmarks/longctx.py`: scores of the tasks of `hip_longctx` with several settings."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting.plots import pyplot

PERPLEXITY = "hip_perplexity"


def draw(document: dict[str, Any], file: Path) -> None:
    """Share of right answers by task, with its interval, a colour for each of the settings; perplexity beside it."""
    plt = pyplot()
    rows = document["rows"]
    names = list(dict.fromkeys(row["settings"] for row in rows))
    panels = [[row for row in rows if (row["task"] == PERPLEXITY) is own] for own in (False, True)]
    panels = [panel for panel in panels if panel]
    tasks = [list(dict.fromkeys(row["task"] for row in panel)) for panel in panels]
    size = (6 + 3 * (len(panels) - 1), 2 + 0.16 * len(names) * max(len(own) for own in tasks))
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, layout="constrained", width_ratios=[2, 1][: len(panels)]
    )
    for axis, panel, own in zip(axes[0], panels, tasks, strict=True):
        for i, name in enumerate(names):
            mine = [row for row in panel if row["settings"] == name]
            places = [own.index(row["task"]) + 0.8 * (i + 0.5) / len(names) - 0.4 for row in mine]
            values = [row["value"] for row in mine]
            bars = [[abs(row[side] - row["value"]) for row in mine] for side in ("low", "high")]
            axis.errorbar(values, places, xerr=bars, fmt="o", capsize=2, color=f"C{i % 10}", label=fill(name, 30))
        axis.set_yticks(range(len(own)), own)
        axis.invert_yaxis()
        axis.set_ylabel("task")
        axis.set_xlabel("perplexity" if own == [PERPLEXITY] else "share of right answers")
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    figure.suptitle(fill(document["title"], 40 * (1 + len(panels))), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
