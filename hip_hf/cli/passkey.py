"""The command `hip-hf passkey`: its options, and how its result is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hip_hf.cli.inputs import Device, Dtype, Sink, Window, load_to_measure, user_errors
from hip_hf.cli.presets import HELP, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, FACT_NAMES, digest
from hip_hf.eval.measure.passkey import PasskeyPlan, measure


def main(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")
    ] = str(CHECKPOINT),
    lengths: Annotated[
        str, typer.Option(help="Tokens of document, question and answer, like 4096,8K.")
    ] = "8192",
    depths: Annotated[
        int, typer.Option(min=1, help="Evenly spaced depths, from beginning to end.")
    ] = 11,
    samples: Annotated[int, typer.Option(min=1, help="Prompts for each length and depth.")] = 10,
    facts: Annotated[
        int,
        typer.Option(
            min=1, max=len(FACT_NAMES), help="Pass keys in each document; one is asked for."
        ),
    ] = 1,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["dense", "defaults"],  # noqa: B006
    budget: Annotated[int | None, typer.Option(help="Keys selected per query block.")] = None,
    sink: Sink = None,
    window: Window = None,
    document: Annotated[Path, typer.Option(help="Plain text to hide the keys in.")] = DOCUMENT,
    batch: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 4,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Hide pass keys in long documents and count right answers, every layer and row sparse unless
    settings say otherwise."""
    with user_errors():
        counts = sizes(lengths)
        targets = Targets(json, output, plot, report_file)
        configs = settings_of(
            settings, tokens=max(counts), checkpoint=model, budget=budget, sink=sink, window=window
        )
        text = document.read_text(encoding="utf-8")
        plan = PasskeyPlan(configs, counts, depths, samples, facts, batch, seed)
        details = measured_on(model, document, dtype, configs, facts=facts, seed=seed)
        kept = targets.kept(
            "passkey", **details, samples=samples, batch=batch, device=device, text=digest(text)
        )
    loaded, tokenizer, tokens = load_to_measure(model, device, text, dtype)
    with kept, user_errors():
        rows = measure(loaded, tokenizer, tokens, plan, kept)
    title = f"Pass keys: answers entirely right, with the 95 % interval ({facts} fact{'s' * (facts > 1)} per document)"
    targets.publish("passkey", title, rows, details, kept)
