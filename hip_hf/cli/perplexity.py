"""The command `hip-hf perplexity`: its options, and how its result is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.presets import Settings, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, digest
from hip_hf.eval.measure.perplexity import PerplexityPlan, perplexity_rows


def main(
    model: inputs.Model = str(CHECKPOINT),
    tokens: Annotated[str, Option(help="Length of each text, like 8192 or 128K.")] = "8K",
    texts: Annotated[int, Option(min=1, help="Texts, evenly spread over the document.")] = 2,
    chunk: Annotated[int, Option(min=1, help="Tokens read at a time.")] = 2048,
    settings: Settings = ["dense", "defaults"],  # noqa: B006
    budget: inputs.Budget = None,
    sink: inputs.Sink = None,
    window: inputs.Window = None,
    document: Annotated[Path, Option(help="Plain text to predict.")] = DOCUMENT,
    device: inputs.Device = "cpu",
    dtype: inputs.Dtype = "fp32",
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
    with inputs.user_errors():
        length, *others = sizes(tokens)
        if others:
            allowed = "one length (its ranges of positions are shown)"
            raise ValueError(f"--tokens: got {tokens!r}, allowed: {allowed}")
        common: dict[str, Any] = dict(checkpoint=model, budget=budget, sink=sink, window=window)
        configs = settings_of(settings, length, **common)
        plan = PerplexityPlan(configs, length, texts, chunk)
        targets = Targets(json, output, plot, report_file)
        text = document.read_text(encoding="utf-8")
        reading = dict(tokens=length, texts=texts, chunk=chunk)
        details = measured_on(model, document, dtype, configs, **reading)
        kept = targets.kept("perplexity", **details, device=device, text=digest(text))
    loaded, _, ids = inputs.load_to_measure(model, device, text, dtype)
    inputs.check_length(length, ids, document)
    with kept:
        rows = perplexity_rows(loaded, ids, plan, kept)
    what = f"{texts} text{'s' * (texts > 1)} of {length:,} tokens"
    title = f"Perplexity by position: {what}, ratio to {next(iter(configs))}"
    targets.publish("perplexity", title, rows, details, kept)
