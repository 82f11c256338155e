"""The command `hip-hf fidelity`: its options, and how its result is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hip_hf.cli.inputs import (
    Device,
    Dtype,
    Sink,
    Window,
    check_length,
    load_to_measure,
    user_errors,
)
from hip_hf.cli.presets import HELP, OWN, refuse_extension, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, FACT_NAMES, digest
from hip_hf.eval.measure.fidelity import FidelityPlan, measure_all
from hip_hf.eval.measure.hyper_assumptions import TITLE as ASSUMPTIONS
from hip_hf.eval.measure.hyper_assumptions import assumption_rows
from hip_hf.eval.reporting import report
from hip_hf.eval.reporting.report import AT
from hip_hf.geometry import DECODE_ROWS

BUDGET = f"Keys selected per query block; default 256, with --stress {HiPConfig.budget}."


def main(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")
    ] = str(CHECKPOINT),
    tokens: Annotated[
        int, typer.Option(help="Length of each text; with --stress, of each segment.")
    ] = 8192,
    prompts: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 2,
    facts: Annotated[
        int,
        typer.Option(
            min=1, max=len(FACT_NAMES), help="Pass keys hidden in each text, and asked for."
        ),
    ] = 8,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["defaults", "paper"],  # noqa: B006
    budget: Annotated[int | None, typer.Option(help=BUDGET)] = None,
    sink: Sink = None,
    window: Window = None,
    document: Annotated[Path, typer.Option(help="Plain text to measure on.")] = DOCUMENT,
    budgets: Annotated[
        str | None, typer.Option(help="Every setting with each of these budgets, like 128,256,512.")
    ] = None,
    stress: Annotated[
        str | None, typer.Option(help="Put segments end to end to so many keys, like 64K,128K.")
    ] = None,
    rows: Annotated[
        int,
        typer.Option(min=1, help="With --stress: query rows, the last ones of the last segment."),
    ] = 1024,
    per_layer: Annotated[
        bool, typer.Option(help="A row for every layer in the table; JSON always has them.")
    ] = True,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Compare selections with the block oracle, layer by layer: captured mass, output error, and
    what they cost."""
    with user_errors():
        lengths = sizes(stress) if stress else [tokens]
        several = sizes(budgets) if budgets else [budget or (HiPConfig.budget if stress else 256)]
        configs: dict[str, HiPConfig] = {}
        for size in several:
            some = settings_of(
                settings,
                tokens=max(lengths),
                checkpoint=model,
                budget=size,
                sink=sink,
                window=window,
            )
            configs |= {
                f"{name}{AT}{size}" if budgets and name != OWN else name: config
                for name, config in some.items()
            }
        refuse_extension(configs)
        if any(length % tokens for length in lengths):
            raise ValueError(f"--stress: got {stress}, allowed: multiples of --tokens {tokens}")
        if stress and not DECODE_ROWS < rows <= tokens:
            raise ValueError(f"--rows: got {rows}, allowed: {DECODE_ROWS + 1} to --tokens {tokens}")
        targets = Targets(json, output, plot, report_file)
        text = document.read_text(encoding="utf-8")
        plan = FidelityPlan(
            configs, tokens, prompts, facts, lengths, rows if stress else None, seed
        )
        shape = dict(query_rows=rows if stress else tokens, segment=tokens if stress else None)
        details = measured_on(
            model, document, dtype, configs, prompts=prompts, facts=facts, seed=seed, **shape
        )
        kept = targets.kept(
            "fidelity", **details, lengths=lengths, device=device, text=digest(text)
        )
    loaded, tokenizer, ids = load_to_measure(model, device, text, dtype)
    segments = prompts * plan.segments
    check_length(tokens, ids, document)
    if segments * tokens > len(ids):
        report.notes.print(
            f"{document.name} has {len(ids):,} tokens: the {segments} texts of {tokens:,} overlap, with other facts each"
        )
    with kept, user_errors():
        found = measure_all(loaded, tokenizer, ids, plan, kept)
    for layer, reason in found.skipped.items():
        report.notes.print(f"layer {layer} is left out: {reason}")
    what = (
        f"the last {rows:,} rows against segments of {tokens:,} tokens end to end"
        if stress
        else f"{tokens:,} tokens"
    )
    title = f"Share of dense attention captured on searched rows, {what}; FLOPs per query row and head, cost as a share of dense"
    layered, table = found.rows(lengths, list(configs))
    tables = {title: layered if per_layer else table}
    if found.assumptions:
        details["hyper_assumptions"] = tables[ASSUMPTIONS] = assumption_rows(found.assumptions)
    targets.publish("fidelity", title, layered, details, kept, tables)
