"""The picture of `hip-hf compare`: what was measured against keys read, a panel for each measure."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.report import AT

# Panels of the picture: column and label.
PANELS = {
    "mass": "share of dense attention captured",
    "error": "relative output error",
    "perplexity": "perplexity",
    "pass_keys": "pass keys entirely right",
    "needle_digits": "digits of needles right",
}


def draw(document: dict[str, Any], file: Path) -> None:
    """What was measured against keys read, a curve for each setting over its budgets; by name where keys are not counted."""
    plt = plots.pyplot()
    rows = document["rows"]
    panels = [name for name in PANELS if any(row.get(name) is not None for row in rows)]
    names = list(dict.fromkeys(row["settings"].partition(AT)[0] for row in rows))
    counted = any(row.get("keys_read") is not None for row in rows)
    size = (5.2 * len(panels), 4.4 + 0.05 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if row["settings"].partition(AT)[0] == name and row.get(panel) is not None]
            style = dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--", label=fill(name, 44))
            places = [row.get("keys_read") if counted else i for row in own]
            if own and None in places:  # dense: a level to compare with
                axis.axhline(own[0][panel], linewidth=1, **{**style, "linestyle": ":"})
            elif own:
                axis.plot(*zip(*sorted(zip(places, (row[panel] for row in own), strict=True)), strict=True), marker="o", **style)
        axis.set_ylabel(PANELS[panel])
        axis.set_xlabel("keys read per row, mean" if counted else "settings, in the order of the table")
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    figure.suptitle(fill(document["title"], 70 * len(panels)), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
