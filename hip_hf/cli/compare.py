"""The command `hip-hf compare`: its options, and how its result is published."""

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
from hip_hf.cli.presets import HELP, over_budgets, parse_choice, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure import perplexity
from hip_hf.eval.measure.compare import MEASURES, captures, measure
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, FACT_NAMES, digest

SETTINGS = ["dense", "defaults", "paper", "streaming"]


def main(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")
    ] = str(CHECKPOINT),
    settings: Annotated[list[str], typer.Option(help=HELP)] = SETTINGS,
    measures: Annotated[str, typer.Option(help=f"Of {', '.join(MEASURES)}.")] = ",".join(MEASURES),
    budgets: Annotated[
        str, typer.Option(help="Every setting with each of these budgets, like 256,512.")
    ] = "256",
    sink: Sink = None,
    window: Window = None,
    tokens: Annotated[int, typer.Option(help="Length of each text and prompt.")] = 8192,
    prompts: Annotated[
        int, typer.Option(min=1, help="Texts for fidelity, perplexity and needles.")
    ] = 2,
    facts: Annotated[
        int,
        typer.Option(
            min=1, max=len(FACT_NAMES), help="Pass keys in each text for fidelity and needles."
        ),
    ] = 8,
    depths: Annotated[int, typer.Option(min=1, help="Depths of the pass keys.")] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Pass keys for each depth.")] = 2,
    document: Annotated[Path, typer.Option(help="Plain text to measure on.")] = DOCUMENT,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Compare methods or settings on one checkpoint, every layer and row sparse unless settings say
    otherwise."""
    with user_errors():
        chosen = parse_choice(measures, MEASURES, "--measures")
        configs = over_budgets(
            settings, sizes(budgets), tokens=tokens, checkpoint=model, sink=sink, window=window
        )
        targets = Targets(json, output, plot, report_file)
        if "perplexity" in chosen:
            perplexity.PerplexityPlan(configs, tokens, prompts, chunk=tokens)
        if "fidelity" in chosen and not any(captures(config) for config in configs.values()):
            raise ValueError(
                "--settings: got dense attention alone, allowed: with --measures fidelity another one as well"
            )
        text = document.read_text(encoding="utf-8")
        plan = dict(
            tokens=tokens, prompts=prompts, facts=facts, depths=depths, samples=samples, seed=seed
        )
        details = measured_on(model, document, dtype, configs, **plan)
        kept = targets.kept("compare", **details, device=device, text=digest(text))
    loaded, tokenizer, ids = load_to_measure(model, device, text, dtype)
    check_length(tokens, ids, document)
    with kept, user_errors():
        rows = measure(loaded, tokenizer, ids, configs, chosen, plan, kept)
    title = f"Methods and settings side by side, {tokens:,} tokens; pass keys and perplexity ratios with 95 % intervals"
    targets.publish("compare", title, rows, details, kept)
