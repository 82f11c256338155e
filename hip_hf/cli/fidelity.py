"""The command `hip-hf fidelity`: its options, and how its result is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.presets import Settings, over_budgets, refuse_extension, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, digest
from hip_hf.eval.measure.fidelity import FidelityPlan, measure_all
from hip_hf.eval.measure.hyper_assumptions import TITLE as ASSUMPTIONS
from hip_hf.eval.measure.hyper_assumptions import assumption_rows
from hip_hf.eval.reporting import report
from hip_hf.geometry import DECODE_ROWS

TOKENS = Option(help="Length of each text; with --stress, of each segment.")
BUDGET = Option(
    help=f"Keys selected per query block; default 256, with --stress {HiPConfig.budget}."
)
BUDGETS = Option(help="Every setting with each of these budgets, like 128,256,512.")
STRESS = Option(help="Numbers of keys to which segments are put end to end, like 64K,128K.")
ROWS = Option(min=1, help="With --stress: query rows, the last ones of the last segment.")
PER_LAYER = Option(help="A row for every layer in the table; JSON always has them.")


def main(
    model: inputs.Model = str(CHECKPOINT),
    tokens: Annotated[int, TOKENS] = 8192,
    prompts: Annotated[int, Option(min=1, help="Texts to measure on.")] = 2,
    facts: Annotated[int, inputs.fact_count("Pass keys hidden in each text, and asked for.")] = 8,
    settings: Settings = ["defaults", "paper"],  # noqa: B006
    budget: Annotated[int | None, BUDGET] = None,
    sink: inputs.Sink = None,
    window: inputs.Window = None,
    document: Annotated[Path, Option(help="Plain text to measure on.")] = DOCUMENT,
    budgets: Annotated[str | None, BUDGETS] = None,
    stress: Annotated[str | None, STRESS] = None,
    rows: Annotated[int, ROWS] = 1024,
    per_layer: Annotated[bool, PER_LAYER] = True,
    device: inputs.Device = "cpu",
    dtype: inputs.Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Compare selections with the block oracle, layer by layer: captured mass, output error, and
    what they cost."""
    with inputs.user_errors():
        lengths = sizes(stress) if stress else [tokens]
        several = sizes(budgets) if budgets else [budget or (HiPConfig.budget if stress else 256)]
        common: dict[str, Any] = dict(
            tokens=max(lengths), checkpoint=model, sink=sink, window=window
        )
        configs = over_budgets(settings, several, always=bool(budgets), **common)
        refuse_extension(configs)
        if any(length % tokens for length in lengths):
            raise ValueError(f"--stress: got {stress}, allowed: multiples of --tokens {tokens}")
        if stress and not DECODE_ROWS < rows <= tokens:
            raise ValueError(f"--rows: got {rows}, allowed: {DECODE_ROWS + 1} to --tokens {tokens}")
        targets = Targets(json, output, plot, report_file)
        text = document.read_text(encoding="utf-8")
        last = rows if stress else None
        plan = FidelityPlan(configs, tokens, prompts, facts, lengths, last, seed)
        shape = dict(query_rows=rows if stress else tokens, segment=tokens if stress else None)
        own = dict(prompts=prompts, facts=facts, seed=seed, **shape)
        details = measured_on(model, document, dtype, configs, **own)
        more = dict(lengths=lengths, device=device, text=digest(text))
        kept = targets.kept("fidelity", **details, **more)
    loaded, tokenizer, ids = inputs.load_to_measure(model, device, text, dtype)
    segments = prompts * plan.segments
    inputs.check_length(tokens, ids, document)
    if segments * tokens > len(ids):
        overlap = f"the {segments} texts of {tokens:,} overlap, with other facts each"
        report.notes.print(f"{document.name} has {len(ids):,} tokens: {overlap}")
    with kept, inputs.user_errors():
        found = measure_all(loaded, tokenizer, ids, plan, kept)
    for layer, reason in found.skipped.items():
        report.notes.print(f"layer {layer} is left out: {reason}")
    what = f"{tokens:,} tokens"
    if stress:
        what = f"the last {rows:,} rows against segments of {what} end to end"
    title = (
        f"Share of dense attention captured on searched rows, {what}; "
        "FLOPs per query row and head, cost as a share of dense"
    )
    layered, table = found.rows(lengths, list(configs))
    tables = {title: layered if per_layer else table}
    if found.assumptions:
        details["hyper_assumptions"] = tables[ASSUMPTIONS] = assumption_rows(found.assumptions)
    targets.publish("fidelity", title, layered, details, kept, tables)
