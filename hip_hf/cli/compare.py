"""The command `hip-hf compare`: its options, and how its result is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.presets import Settings, over_budgets, parse_choice, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure import perplexity
from hip_hf.eval.measure.compare import MEASURES, captures, measure_settings
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, digest

SETTINGS = ["dense", "defaults", "paper", "streaming"]


def main(
    model: inputs.Model = str(CHECKPOINT),
    settings: Settings = SETTINGS,
    measures: Annotated[str, Option(help=f"Of {', '.join(MEASURES)}.")] = ",".join(MEASURES),
    budgets: inputs.Budgets = "256",
    sink: inputs.Sink = None,
    window: inputs.Window = None,
    tokens: Annotated[int, Option(help="Length of each text and prompt.")] = 8192,
    prompts: Annotated[int, Option(min=1, help="Texts for fidelity, perplexity and needles.")] = 2,
    facts: Annotated[
        int, inputs.fact_count("Pass keys in each text for fidelity and needles.")
    ] = 8,
    depths: Annotated[int, Option(min=1, help="Depths of the pass keys.")] = 11,
    samples: Annotated[int, Option(min=1, help="Pass keys for each depth.")] = 2,
    document: Annotated[Path, Option(help="Plain text to measure on.")] = DOCUMENT,
    device: inputs.Device = "cpu",
    dtype: inputs.Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Compare methods or settings on one checkpoint, every layer and row sparse unless settings say
    otherwise."""
    with inputs.user_errors():
        chosen = parse_choice(measures, MEASURES, "--measures")
        common: dict[str, Any] = dict(tokens=tokens, checkpoint=model, sink=sink, window=window)
        configs = over_budgets(settings, sizes(budgets), **common)
        targets = Targets(json, output, plot, report_file)
        if "perplexity" in chosen:
            perplexity.PerplexityPlan(configs, tokens, prompts, chunk=tokens)
        if "fidelity" in chosen and not any(captures(config) for config in configs.values()):
            allowed = "with --measures fidelity another one as well"
            raise ValueError(f"--settings: got dense attention alone, allowed: {allowed}")
        text = document.read_text(encoding="utf-8")
        plan = dict(
            tokens=tokens, prompts=prompts, facts=facts, depths=depths, samples=samples, seed=seed
        )
        details = measured_on(model, document, dtype, configs, **plan)
        kept = targets.kept("compare", **details, device=device, text=digest(text))
    loaded, tokenizer, ids = inputs.load_to_measure(model, device, text, dtype)
    inputs.check_length(tokens, ids, document)
    with kept, inputs.user_errors():
        rows = measure_settings(loaded, tokenizer, ids, configs, chosen, plan, kept)
    what = f"Methods and settings side by side, {tokens:,} tokens"
    title = f"{what}; pass keys and perplexity ratios with 95 % intervals"
    targets.publish("compare", title, rows, details, kept)
