"""The command `hip-hf memory`: its options, and how its result is published."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hip_hf.cli.inputs import cannot_load
from hip_hf.cli.presets import sizes
from hip_hf.cli.publish import Json, Output, Plot, Report, Results, Targets, model_name
from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.eval.measure.memory import KINDS, in_own_process, read_config
from hip_hf.eval.reporting import report
from hip_hf.eval.reporting.pictures.memory import draw


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint whose shape is taken; its weights are not.")] = str(CHECKPOINT),
    lengths: Annotated[str, typer.Option(help="Comma-separated; K stands for 1024.")] = "8K,32K,128K",
    output: Output = None,
    plot: Plot = None,
    report_file: Report = None,
    as_json: Json = False,
) -> None:
    """Memory of a dynamic, a static, a paged and an offloaded cache (pools: an eighth, or what a step needs)."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("hip-hf memory reads /proc, which this system does not have (allowed: Linux)")
    try:
        counts = sizes(lengths)
        targets = Targets(as_json, output, plot, report_file)
        kept = targets.kept("memory", model=model_name(model))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        config = read_config(model)
    except (OSError, ValueError) as error:
        raise cannot_load(repr(model), error) from None
    rows = []
    with kept, report.progress() as bar:
        task = bar.add_task("caches", total=len(counts) * len(KINDS))
        for length in counts:
            for kind in KINDS:
                rows.append(kept.get((kind, length), partial(in_own_process, kind, config, length)))
                bar.advance(task)
    targets.publish(Results("memory", "Memory of caches", rows, {"model": model_name(model)}, draw), kept)
