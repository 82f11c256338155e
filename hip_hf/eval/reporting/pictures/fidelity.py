"""Pictures of a fidelity report: mass by layer, and output error against keys read, a curve for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting.plots import pyplot
from hip_hf.eval.reporting.report import AT


def draw(document: dict[str, Any], file: Path) -> None:
    """Results as `hip-hf fidelity` prints them; those of the first length are drawn, `mass by layer` of the smallest budget."""
    plt = pyplot()
    rows: Sequence[dict[str, Any]] = document["rows"]
    names = list(dict.fromkeys(row["settings"].partition(AT)[0] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for i, name in enumerate(names):
        own = [row for row in rows if row["settings"].partition(AT)[0] == name and row["keys"] == rows[0]["keys"]]
        style = dict(marker="o", color=f"C{i % 10}", linestyle="-" if i < 10 else "--", label=name)
        least = min(own, key=lambda row: row["keys_read"] if row["layer"] == "all" else float("inf"))["settings"]
        layers = [(row["layer"], row["mass"]) for row in own if row["layer"] != "all" and row["settings"] == least]
        left.plot(*zip(*layers, strict=True), **style)
        points = sorted((row["keys_read"], row["error"]) for row in own if row["layer"] == "all")
        right.plot(*zip(*points, strict=True), **style)
    left.set(xlabel="layer", ylabel="share of dense attention captured", title="mass by layer, smallest budget", ylim=(0, 1.02))
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="keys read per row, mean", ylabel="relative output error", title="error against keys read")
    right.set_yscale("log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle("\n".join(fill(line, 150) for line in document["title"].split("\n")), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)
