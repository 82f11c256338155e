"""The command `hip-hf passkey`: its options, and how its result is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.presets import Settings, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, digest
from hip_hf.eval.measure.passkey import PasskeyPlan, passkey_rows

LENGTHS = Option(help="Tokens of document, question and answer, like 4096,8K.")


def main(
    model: inputs.Model = str(CHECKPOINT),
    lengths: Annotated[str, LENGTHS] = "8192",
    depths: Annotated[int, Option(min=1, help="Evenly spaced depths, from start to end.")] = 11,
    samples: Annotated[int, Option(min=1, help="Prompts for each length and depth.")] = 10,
    facts: Annotated[int, inputs.fact_count("Pass keys in each document; one is asked for.")] = 1,
    settings: Settings = ["dense", "defaults"],  # noqa: B006
    budget: inputs.Budget = None,
    sink: inputs.Sink = None,
    window: inputs.Window = None,
    document: Annotated[Path, Option(help="Plain text to hide the keys in.")] = DOCUMENT,
    batch: Annotated[int, Option(min=1, help="Prompts generated together.")] = 4,
    device: inputs.Device = "cpu",
    dtype: inputs.Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Hide pass keys in long documents and count right answers, every layer and row sparse unless
    settings say otherwise."""
    with inputs.user_errors():
        counts = sizes(lengths)
        targets = Targets(json, output, plot, report_file)
        common: dict[str, Any] = dict(checkpoint=model, budget=budget, sink=sink, window=window)
        configs = settings_of(settings, max(counts), **common)
        text = document.read_text(encoding="utf-8")
        plan = PasskeyPlan(configs, counts, depths, samples, facts, batch, seed)
        details = measured_on(model, document, dtype, configs, facts=facts, seed=seed)
        more = dict(samples=samples, batch=batch, device=device, text=digest(text))
        kept = targets.kept("passkey", **details, **more)
    loaded, tokenizer, tokens = inputs.load_to_measure(model, device, text, dtype)
    with kept, inputs.user_errors():
        rows = passkey_rows(loaded, tokenizer, tokens, plan, kept)
    number = f"{facts} fact{'s' * (facts > 1)} per document"
    title = f"Pass keys: answers entirely right, with the 95 % interval ({number})"
    targets.publish("passkey", title, rows, details, kept)
