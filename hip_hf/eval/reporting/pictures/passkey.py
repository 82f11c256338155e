"""The picture of `hip-hf passkey`: a heat map."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting import plots


def draw(document: dict[str, Any], file: Path) -> None:
    """The heat map: accuracy by depth, a line for every length and setting."""
    pyplot = plots.pyplot()
    cells = [row for row in document["rows"] if row["depth"] != "all"]
    lines = list(dict.fromkeys((row["settings"], row["length"]) for row in cells))
    depths = list(dict.fromkeys(row["depth"] for row in cells))
    grid = [[math.nan] * len(depths) for _ in lines]
    for row in cells:
        grid[lines.index((row["settings"], row["length"]))][depths.index(row["depth"])] = row["accuracy"]
    labels = [fill(f"{name}, {length:,}", 44) for name, length in lines]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    size = (3 + 0.6 * len(depths) + 0.09 * longest, 1.5 + sum(0.5 + 0.2 * label.count("\n") for label in labels))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(depths)), depths)
    axes.set_yticks(range(len(lines)), labels)
    axes.set_xlabel("depth of the pass key (0: beginning of the document)")
    axes.set_ylabel("settings, length in tokens")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="answers entirely right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
