"""Pictures: the little of matplotlib that the commands share. It is imported when a picture is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

# How a key block may stand to a query block, and its colour.
KINDS = {
    "not read": "#f4f4f4",
    "read densely": "#c9d7e8",
    "sink": "#e08214",
    "window": "#4d9221",
    "selected": "#2b4c9b",
}
FUTURE = "#ffffff"


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files only. Ends the command with one line if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is missing: pip install 'hip-hf[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def short(count: float) -> str:
    """8192 -> `8K`."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 512 == 0 else f"{count:g}"


def ratios(file: Path, title: str, panels: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    """Lines of (length, ratio), one panel each, on logarithmic axes: `panels` `{panel: {line: points}}`."""
    plt = pyplot()
    size = (5.6 * len(panels), 4.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=fill(label, 44))
        lengths = sorted({length for points in lines.values() for length, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [short(length) for length in lengths])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if str(value).strip("0.")[:1] in "25" else "")
        axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
        axis.grid(which="both", alpha=0.25)
        axis.set_xlabel("context length (tokens)")
        axis.set_title(name)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("times faster than PyTorch's SDPA")
    figure.suptitle("\n".join(fill(line, 80 * len(panels)) for line in title.split("\n")), fontsize=9)
    figure.savefig(file, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Panel:
    """One picture of who reads what: `kinds` `[query blocks, key blocks]` indexes `KINDS`, -1 is the future."""

    title: str
    kinds: torch.Tensor
    block_q: int
    block_k: int


def readings(file: Path, title: str, panels: list[Panel], tokens: int, marks: dict[str, int], question: int) -> None:
    """Which key blocks each query block reads. `marks`: where the facts stand; `question`: the row it begins at."""
    plt = pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (7.2 * columns, 5.6 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    colours = ListedColormap([FUTURE, *KINDS.values()])
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        extent = (0, panel.kinds.shape[1] * panel.block_k, panel.kinds.shape[0] * panel.block_q, 0)
        scale = dict(cmap=colours, vmin=-0.5, vmax=len(KINDS) + 0.5)
        axis.imshow((panel.kinds + 1).numpy(), extent=extent, aspect="auto", interpolation="nearest", **scale)
        axis.set(xlim=(0, tokens), ylim=(tokens, 0))
        for name, at in marks.items():
            axis.axvline(at, color="crimson", linewidth=0.7, linestyle=":")
            axis.text(at, 0, f"{name} ", color="crimson", fontsize=8, rotation=90, va="top", ha="right")
        axis.axhline(question, color="black", linewidth=0.7, linestyle="--")
        axis.text(tokens, question, " question", fontsize=8, va="center", ha="left")
        axis.set_title(panel.title, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("key position (token)")
    for axis in axes[:, 0]:
        axis.set_ylabel("query position (token)")
    legend = [Patch(facecolor=colour, edgecolor="grey", label=kind) for kind, colour in KINDS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=150)
    plt.close(figure)
