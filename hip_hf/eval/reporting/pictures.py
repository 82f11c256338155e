"""The pictures of saved results: a function for each command or benchmark draws its document."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from textwrap import fill
from typing import Any

from hip_hf.eval.reporting.plots import drawing, short
from hip_hf.eval.reporting.report import AT, grouped

LATENCY_TITLE = "latency: "
LONGCTX_PERPLEXITY = "hip_perplexity"
# Panels of the picture of `compare`: column and label.
COMPARED = {
    "mass": "share of dense attention captured",
    "error": "relative output error",
    "perplexity": "perplexity",
    "pass_keys": "pass keys entirely right",
    "needle_digits": "digits of needles right",
}
# And of those of `serving`.
SERVED = {
    "first_token_s": "seconds to the first token",
    "tokens_per_s": "new tokens a second, of all clients",
}

Record = dict[str, Any]


def different(rows: list[Record], *names: str) -> list[Any]:
    """The different values of a column, or of several together, in the order of the rows."""
    return list(dict.fromkeys(map(itemgetter(*names), rows)))


def setting_of(row: Record) -> str:
    """The name of a row's settings without their budget."""
    return row["settings"].partition(AT)[0]


def style_of(i: int) -> dict[str, Any]:
    """The look of the `i`-th of up to twenty lines."""
    return dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--")


def line(axis: Any, points: Any, **style: Any) -> None:
    """A line of (x, y) points."""
    axis.plot(*zip(*points, strict=True), marker="o", **style)


def by_length(axis: Any, lengths: set[int], label: str) -> None:
    """Both axes logarithmic, with these lengths below the first."""
    axis.set(yscale="log", xlabel="context length (tokens)", ylabel=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(lengths), [short(length) for length in sorted(lengths)])
    axis.grid(which="both", alpha=0.25)
    axis.legend(fontsize=8)


def draw_passkey(document: Record, file: Path) -> None:
    """The heat map: accuracy by depth, a line for every length and setting."""
    cells = [row for row in document["rows"] if row["depth"] != "all"]
    lines, depths = different(cells, "settings", "length"), different(cells, "depth")
    grid = [[math.nan] * len(depths) for _ in lines]
    for row in cells:
        line_of = grid[lines.index((row["settings"], row["length"]))]
        line_of[depths.index(row["depth"])] = row["accuracy"]
    labels = [fill(f"{name}, {length:,}", 44) for name, length in lines]
    longest = max(len(part) for label in labels for part in label.split("\n"))
    height = 1.5 + sum(0.5 + 0.2 * label.count("\n") for label in labels)
    with drawing(file, (3 + 0.6 * len(depths) + 0.09 * longest, height)) as (figure, ((axis,),)):
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(depths)), depths)
        axis.set_yticks(range(len(lines)), labels)
        across = "depth of the pass key (0: beginning of the document)"
        axis.set(xlabel=across, ylabel="settings, length in tokens")
        for y, values in enumerate(grid):
            for x, value in enumerate(values):
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
        figure.colorbar(image, label="answers entirely right")


def draw_needles(document: Record, file: Path) -> None:
    """Digits right against density: a line over the budgets for each setting, length and document;
    dense attention is a level."""
    rows = document["rows"]
    lines = grouped(rows, lambda row: (setting_of(row), row["length"], row["document"]))
    with drawing(file, (8, 4.8), title=document["title"]) as (_, ((axis,),)):
        for i, ((name, length, text), own) in enumerate(lines.items()):
            style = dict(color=f"C{i % 10}", label=fill(f"{name}, {short(length)}, {text}", 44))
            if document["configs"][own[0]["settings"]]["method"] == "dense":
                axis.axhline(own[0]["digits"], linewidth=1, linestyle=":", **style)
            else:
                line(axis, sorted((row["read"], row["digits"]) for row in own), **style)
        axis.set(xlabel="share of keys read", ylabel="digits right", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_perplexity(document: Record, file: Path) -> None:
    """Perplexity of each range of positions, a line per setting."""
    rows = document["rows"]
    whole = max(row["to"] for row in rows)
    parts = [row for row in rows if (row["from"], row["to"]) != (0, whole)] or rows
    ranges = sorted(set(different(parts, "from", "to")))
    with drawing(file, (8, 4.4), title=document["title"]) as (_, ((axis,),)):
        for name, mine in grouped(parts, itemgetter("settings")).items():
            own = {(row["from"], row["to"]): row for row in mine}
            heights = [own[span]["perplexity"] for span in ranges]
            bars = []
            for side in ("low", "high"):
                ends = [own[span][side] or own[span]["perplexity"] for span in ranges]
                bars.append([abs(a - b) for a, b in zip(ends, heights, strict=True)])
            style = dict(marker="o", capsize=3, label=fill(name, 44))
            axis.errorbar(range(len(ranges)), heights, yerr=bars, **style)
        words = [f"{short(start)} to {short(end)}" for start, end in ranges]
        axis.set_xticks(range(len(ranges)), words)
        height = "perplexity, with the 95 % interval"
        axis.set(xlabel="position in the text (tokens)", ylabel=height)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def draw_fidelity(document: Record, file: Path) -> None:
    """Mass by layer, and output error against keys read, a curve for each setting. Those of the
    first length are drawn, `mass by layer` of the smallest budget."""
    rows = [row for row in document["rows"] if row["keys"] == document["rows"][0]["keys"]]
    with drawing(file, (13, 5.2), 1, 2, document["title"], 150) as (_, ((left, right),)):
        for i, (name, own) in enumerate(grouped(rows, setting_of).items()):
            style = {**style_of(i), "label": name}
            whole = [row for row in own if row["layer"] == "all"]
            least = min(whole, key=lambda row: row["keys_read"])["settings"]
            layers = [row for row in own if row["layer"] != "all" and row["settings"] == least]
            line(left, [(row["layer"], row["mass"]) for row in layers], **style)
            line(right, sorted((row["keys_read"], row["error"]) for row in whole), **style)
        left.set(xlabel="layer", ylabel="share of dense attention captured", ylim=(0, 1.02))
        left.set(title="mass by layer, smallest budget")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="keys read per row, mean", ylabel="relative output error", yscale="log")
        right.set(title="error against keys read")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_latency(document: Record, file: Path) -> None:
    """Times faster than PyTorch against the length: prefill and decode side by side, a line per
    dtype and setting."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in document["rows"]:
        if row["times_faster"]:  # selection alone has no counterpart
            panel, _, how = row["phase"].partition(" ")
            label = " ".join(part for part in (row["dtype"], row["settings"], how) if part)
            points = panels.setdefault(panel, {}).setdefault(label, [])
            points.append((row["length"], row["times_faster"]))
    conditions = document["title"].removeprefix(LATENCY_TITLE)
    title = f"One attention call, hip against scaled_dot_product_attention\n{conditions}"
    size = (5.6 * len(panels), 4.4)
    with drawing(file, size, 1, len(panels), title, 80 * len(panels), sharey=True) as (_, (axes,)):
        for axis, (name, lines) in zip(axes, panels.items(), strict=True):
            for label, points in lines.items():
                line(axis, points, label=fill(label, 44))
            by_length(axis, {length for points in lines.values() for length, _ in points}, "")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axis.yaxis.set_minor_formatter(
                lambda value, _: f"{value:g}x" if str(value).strip("0.")[:1] in "25" else ""
            )
            axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
            axis.set_title(name)
        axes[0].set_ylabel("times faster than PyTorch's SDPA")


def draw_memory(document: Record, file: Path) -> None:
    """Peak and device memory against the length, a line for each kind of cache."""
    rows = document["rows"]
    with drawing(file, (10, 4), 1, 2) as (_, (axes,)):
        for axis, name in zip(axes, ("peak_MiB", "device_MiB"), strict=True):
            for kind, own in grouped(rows, itemgetter("cache")).items():
                line(axis, [(row["length"], row[name]) for row in own], label=kind)
            by_length(axis, {row["length"] for row in rows}, name.replace("_", " memory, "))


def draw_compare(document: Record, file: Path) -> None:
    """What was measured against keys read, a curve for each setting over its budgets; by name where
    keys are not counted."""
    rows = document["rows"]
    panels = [name for name in COMPARED if any(row.get(name) is not None for row in rows)]
    settings = grouped(rows, setting_of)
    counted = any(row.get("keys_read") is not None for row in rows)
    size = (5.2 * len(panels), 4.4 + 0.05 * len(settings))
    width = 70 * len(panels)
    with drawing(file, size, 1, len(panels), document["title"], width) as (figure, (axes,)):
        for axis, panel in zip(axes, panels, strict=True):
            for i, (name, mine) in enumerate(settings.items()):
                own = [row for row in mine if row.get(panel) is not None]
                style = {**style_of(i), "label": fill(name, 44)}
                places = [row.get("keys_read") if counted else i for row in own]
                if own and None in places:  # dense: a level to compare with
                    axis.axhline(own[0][panel], linewidth=1, **{**style, "linestyle": ":"})
                elif own:
                    values = (row[panel] for row in own)
                    line(axis, sorted(zip(places, values, strict=True)), **style)
            across = "keys read per row, mean" if counted else "settings, in the order of the table"
            axis.set(xlabel=across, ylabel=COMPARED[panel])
            axis.grid(alpha=0.3)
        found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
        handles = {label: handle for pairs in found for handle, label in pairs}
        ncols = min(6, len(handles))
        legend: dict[str, Any] = dict(loc="outside lower center", ncols=ncols, fontsize=8)
        figure.legend(handles.values(), handles.keys(), **legend)


def draw_longctx(document: Record, file: Path) -> None:
    """Scores of the tasks of `hip_longctx`: share of right answers by task, with its interval, a
    colour for each of the settings; perplexity beside it."""
    rows = document["rows"]
    names = different(rows, "settings")
    scores = [row for row in rows if row["task"] != LONGCTX_PERPLEXITY]
    others = [row for row in rows if row["task"] == LONGCTX_PERPLEXITY]
    panels = [panel for panel in (scores, others) if panel]
    tasks = [different(panel, "task") for panel in panels]
    size = (6 + 3 * (len(panels) - 1), 2 + 0.16 * len(names) * max(len(own) for own in tasks))
    kind: dict[str, Any] = dict(width=40 * (1 + len(panels)), width_ratios=[2, 1][: len(panels)])
    with drawing(file, size, 1, len(panels), document["title"], **kind) as (figure, (axes,)):
        for axis, panel, own in zip(axes, panels, tasks, strict=True):
            for i, name in enumerate(names):
                mine = [row for row in panel if row["settings"] == name]
                down = 0.8 * (i + 0.5) / len(names) - 0.4
                places = [own.index(row["task"]) + down for row in mine]
                values = [row["value"] for row in mine]
                bars = [[abs(row[side] - row["value"]) for row in mine] for side in ("low", "high")]
                style = dict(fmt="o", capsize=2, color=f"C{i % 10}", label=fill(name, 30))
                axis.errorbar(values, places, xerr=bars, **style)
            axis.set_yticks(range(len(own)), own)
            axis.invert_yaxis()
            across = "perplexity" if own == [LONGCTX_PERPLEXITY] else "share of right answers"
            axis.set(xlabel=across, ylabel="task")
            axis.grid(axis="x", alpha=0.3)
        legend: dict[str, Any] = dict(loc="outside lower center", ncols=min(4, len(names)))
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, **legend)


def draw_serving(document: Record, file: Path) -> None:
    """How long clients wait for their first token, and how many tokens they get together: a row of
    panels for each length of prompts, both figures by the number of clients, a line for each
    attention."""
    rows = document["rows"]
    lengths = grouped(rows, itemgetter("tokens"))
    size = (4.5 * len(SERVED), 0.6 + 2.8 * len(lengths))
    with drawing(file, size, len(lengths), len(SERVED), document["title"]) as (_, axes):
        for length, own in zip(lengths, axes, strict=True):
            for axis, (column, words) in zip(own, SERVED.items(), strict=True):
                for name, mine in grouped(lengths[length], itemgetter("attention")).items():
                    line(axis, [(row["clients"], row[column]) for row in mine], label=name)
                title = f"prompts of {short(length)} tokens"
                axis.set(title=title, xlabel="clients at once", ylabel=words)
                axis.set_xticks(sorted({row["clients"] for row in rows}))
                axis.set_ylim(bottom=0)
                axis.grid(alpha=0.3)
                axis.legend(fontsize=8)


# By the command or the benchmark (`longctx`, `serving`) that wrote the document.
PICTURES: dict[str, Callable[[Record, Path], None]] = {
    name.removeprefix("draw_"): draw for name, draw in globals().items() if name.startswith("draw_")
}
