"""The picture of `hip-hf memory`: memory against the length, a line for each kind of cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hip_hf.eval.reporting.plots import pyplot, short


def draw(document: dict[str, Any], file: Path) -> None:
    """Peak and device memory against the length."""
    rows = document["rows"]
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("peak_MiB", "device_MiB"), strict=True):
        for kind in dict.fromkeys(row["cache"] for row in rows):
            points = [(row["length"], row[name]) for row in rows if row["cache"] == kind]
            axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        lengths = sorted({row["length"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [short(length) for length in lengths])
        axis.set_xlabel("context length (tokens)")
        axis.set_ylabel(name.replace("_", " memory, "))
        axis.grid(which="both", alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=140)
    plt.close(figure)
