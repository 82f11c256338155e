"""The command `hip-hf needles`: its options, and how its result is published."""

from __future__ import annotations

from platform import python_version
from typing import Annotated

import typer

from hip_hf.cli.inputs import Device, Dtype, Sink, Window, load_to_measure, user_errors
from hip_hf.cli.presets import HELP, over_budgets, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure.documents import CHECKPOINT, FACT_NAMES, digest
from hip_hf.eval.measure.needles import CODE, NOVEL, NeedlesPlan, measure, read_documents
from hip_hf.eval.reporting import report


def main(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")
    ] = str(CHECKPOINT),
    lengths: Annotated[
        str, typer.Option(help="Tokens of document, questions and answers, like 4096,8K.")
    ] = "4096",
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["dense", "defaults"],  # noqa: B006
    budgets: Annotated[
        str, typer.Option(help="Every setting with each of these budgets, like 256,1024.")
    ] = "256",
    sink: Sink = None,
    window: Window = None,
    documents: Annotated[
        str,
        typer.Option(
            help=f"{NOVEL} (shipped), {CODE} (Python's standard library) or text files, like {NOVEL},{CODE}."
        ),
    ] = NOVEL,
    prompts: Annotated[int, typer.Option(min=1, help="Documents of each length and kind.")] = 8,
    facts: Annotated[
        int,
        typer.Option(min=1, max=len(FACT_NAMES), help="Pass keys in each document, all asked for."),
    ] = 8,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="Read the documents by dense attention, questions and answers token by token.",
        ),
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: int = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    json: Json = False,
) -> None:
    """Hide many pass keys in a document, ask for all in one forward pass, answers included, and
    count digits that are right.

    With `--decode` the document is read first, and what comes after it by decode steps.
    Every layer and row is sparse unless settings say otherwise. `perplexity` is that of the
    document, its notes included, before the questions; `nll` that of an answer's digit, in nats.
    Differences and ratios to dense are to dense attention on the same prompts; FLOPs are those of a
    layer that is sparse.
    """
    with user_errors():
        counts = sizes(lengths)
        targets = Targets(json, output, plot, report_file)
        configs = over_budgets(
            settings, sizes(budgets), tokens=max(counts), checkpoint=model, sink=sink, window=window
        )
        texts = read_documents(documents)
        plan = NeedlesPlan(configs, counts, prompts, facts, seed, decode)
        names = ", ".join(
            f"{name} of Python {python_version()}" if name == CODE else name for name in texts
        )
        details = measured_on(
            model, names, dtype, configs, prompts=prompts, facts=facts, seed=seed, decode=decode
        )
        request = dict(
            lengths=counts,
            device=device,
            texts={name: digest(text) for name, text in texts.items()},
        )
        kept = targets.kept("needles", **details, **request)
    loaded, tokenizer, _ = load_to_measure(model, device, "", dtype)
    tokens = {
        name: tokenizer.encode(text, add_special_tokens=False, verbose=False)
        for name, text in texts.items()
    }
    for name, ids in tokens.items():
        if prompts * max(counts) > len(ids):
            report.notes.print(
                f"{name} has {len(ids):,} tokens: the windows of the {prompts} prompts overlap, with other facts each"
            )

    with kept, user_errors():
        rows = measure(loaded, tokenizer, tokens, plan, kept)
    title = f"Needles: digits right of {facts} pass keys asked for at once, answers with the 95 % interval; {names}"
    targets.publish("needles", title, rows, details, kept)
