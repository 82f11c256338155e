"""Pictures: the little of matplotlib that the commands share. It is imported when a picture is
asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

# How a key block may stand to a query block, and its colour.
BLOCK_KINDS = {
    "not read": "#f4f4f4",
    "read densely": "#c9d7e8",
    "sink": "#e08214",
    "window": "#4d9221",
    "selected": "#2b4c9b",
}
FUTURE = "#ffffff"


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files only. Ends the command with one line if matplotlib is
    missing."""
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


@contextmanager
def drawing(
    file: Path,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    title: str = "",
    width: int = 100,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes `[rows, columns]`, written to `file` at the end.

    Its `title` has lines of at most `width` characters. `options` are those of `pyplot.subplots`.
    """
    plt = pyplot()
    options = dict(figsize=size, squeeze=False, layout="constrained", **options)
    figure, axes = plt.subplots(rows, columns, **options)
    if title:
        figure.suptitle("\n".join(fill(line, width) for line in title.split("\n")), fontsize=9)
    yield figure, axes
    figure.savefig(file, dpi=140)
    plt.close(figure)


@dataclass(frozen=True)
class Panel:
    """One picture of who reads what: `kinds` `[query blocks, key blocks]` indexes `BLOCK_KINDS`, -1
    is the future."""

    title: str
    kinds: torch.Tensor
    block_q: int
    block_k: int


def readings(
    file: Path, title: str, panels: list[Panel], tokens: int, marks: dict[str, int], question: int
) -> None:
    """Which key blocks each query block reads. `marks`: where the facts stand; `question`: the row
    it begins at."""
    pyplot()  # if it is missing, say so
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    colours = ListedColormap([FUTURE, *BLOCK_KINDS.values()])
    scale = dict(cmap=colours, vmin=-0.5, vmax=len(BLOCK_KINDS) + 0.5, aspect="auto")
    size, shared = (7.2 * columns, 5.6 * rows + 0.8), dict(sharex=True, sharey=True)
    with drawing(file, size, rows, columns, title, **shared) as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, panel in zip(axes.flat, panels, strict=False):
            height, width = panel.kinds.shape
            extent = (0, width * panel.block_k, height * panel.block_q, 0)
            axis.imshow((panel.kinds + 1).numpy(), extent=extent, interpolation="nearest", **scale)
            axis.set(xlim=(0, tokens), ylim=(tokens, 0))
            for name, at in marks.items():
                axis.axvline(at, color="crimson", linewidth=0.7, linestyle=":")
                style: dict[str, Any] = dict(color="crimson", fontsize=8, rotation=90)
                axis.text(at, 0, f"{name} ", va="top", ha="right", **style)
            axis.axhline(question, color="black", linewidth=0.7, linestyle="--")
            axis.text(tokens, question, " question", fontsize=8, va="center", ha="left")
            axis.set_title(panel.title, fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("key position (token)")
        for axis in axes[:, 0]:
            axis.set_ylabel("query position (token)")
        kinds = BLOCK_KINDS.items()
        legend = [Patch(facecolor=c, edgecolor="grey", label=kind) for kind, c in kinds]
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
