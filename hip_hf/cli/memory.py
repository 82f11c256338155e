"""The command `hip-hf memory`: its options, and how its result is published."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hip_hf.cli.inputs import loading, user_errors
from hip_hf.cli.presets import sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, model_name
from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.eval.measure.memory import CACHE_KINDS, read_config, row_in_own_process

SHAPE = Argument(help="Checkpoint whose shape is taken; its weights are not.")


def main(
    model: Annotated[str, SHAPE] = str(CHECKPOINT),
    lengths: Annotated[str, Option(help="Comma-separated; K stands for 1024.")] = "8K,32K,128K",
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Memory of a dynamic, a static, a paged and an offloaded cache (pools: an eighth, or what a
    step needs)."""
    if not Path("/proc/self/clear_refs").exists():
        lacks = "reads /proc, which this system does not have (allowed: Linux)"
        raise SystemExit(f"hip-hf memory {lacks}")
    with user_errors():
        counts = sizes(lengths)
        targets = Targets(as_json, output, plot, report_file)
        kept = targets.kept("memory", model=model_name(model))
    with loading(repr(model)):
        config = read_config(model)
    cells = [(kind, length) for length in counts for kind in CACHE_KINDS]
    kept.expect("caches", len(cells))
    with kept:
        rows = [
            kept.get(cell, partial(row_in_own_process, cell[0], config, cell[1])) for cell in cells
        ]
    targets.publish("memory", "Memory of caches", rows, {"model": model_name(model)}, kept)
