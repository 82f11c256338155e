"""The command `hip-hf perplexity`: its options, and how its result is published."""

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
from hip_hf.cli.presets import HELP, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, digest
from hip_hf.eval.measure.perplexity import PerplexityPlan, measure


def main(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")
    ] = str(CHECKPOINT),
    tokens: Annotated[str, typer.Option(help="Length of each text, like 8192 or 128K.")] = "8K",
    texts: Annotated[int, typer.Option(min=1, help="Texts, evenly spread over the document.")] = 2,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 2048,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["dense", "defaults"],  # noqa: B006
    budget: Annotated[int | None, typer.Option(help="Keys selected per query block.")] = None,
    sink: Sink = None,
    window: Window = None,
    document: Annotated[Path, typer.Option(help="Plain text to predict.")] = DOCUMENT,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Perplexity of a local text by position, every layer and row sparse unless settings say
    otherwise.

    `ratio` compares with the first of the settings, on the same tokens. The 95 % intervals take
    blocks of 128 tokens as independent.
    """
    with user_errors():
        lengths = sizes(tokens)
        if len(lengths) > 1:
            raise ValueError(
                f"--tokens: got {tokens!r}, allowed: one length (its ranges of positions are shown)"
            )
        configs = settings_of(
            settings, tokens=lengths[0], checkpoint=model, budget=budget, sink=sink, window=window
        )
        plan = PerplexityPlan(configs, lengths[0], texts, chunk)
        targets = Targets(json, output, plot, report_file)
        text = document.read_text(encoding="utf-8")
        details = measured_on(
            model, document, dtype, configs, tokens=plan.tokens, texts=texts, chunk=chunk
        )
        kept = targets.kept("perplexity", **details, device=device, text=digest(text))
    loaded, _, ids = load_to_measure(model, device, text, dtype)
    check_length(plan.tokens, ids, document)
    with kept:
        rows = measure(loaded, ids, plan, kept)
    title = f"Perplexity by position: {texts} text{'s' * (texts > 1)} of {plan.tokens:,} tokens, ratio to {next(iter(configs))}"
    targets.publish("perplexity", title, rows, details, kept)
