"""The command `hip-hf needles`: its options, and how its result is published."""

from __future__ import annotations

from platform import python_version
from typing import Annotated, Any

from typer import Option

from hip_hf.cli import inputs
from hip_hf.cli.presets import Settings, over_budgets, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets, measured_on
from hip_hf.eval.measure.documents import CHECKPOINT, digest, encode
from hip_hf.eval.measure.needles import CODE, NOVEL, NeedlesPlan, needles_rows, read_documents
from hip_hf.eval.reporting import report

LENGTHS = Option(help="Tokens of document, questions and answers, like 4096,8K.")
_KINDS = f"{NOVEL} (shipped), {CODE} (Python's standard library) or text files"
DOCUMENTS = Option(help=f"{_KINDS}, like {NOVEL},{CODE}.")
_DECODE = "Read the documents by dense attention, questions and answers token by token."


def main(
    model: inputs.Model = str(CHECKPOINT),
    lengths: Annotated[str, LENGTHS] = "4096",
    settings: Settings = ["dense", "defaults"],  # noqa: B006
    budgets: inputs.Budgets = "256",
    sink: inputs.Sink = None,
    window: inputs.Window = None,
    documents: Annotated[str, DOCUMENTS] = NOVEL,
    prompts: Annotated[int, Option(min=1, help="Documents of each length and kind.")] = 8,
    facts: Annotated[int, inputs.fact_count("Pass keys in each document, all asked for.")] = 8,
    decode: Annotated[bool, Option("--decode", help=_DECODE)] = False,
    device: inputs.Device = "cpu",
    dtype: inputs.Dtype = "fp32",
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
    with inputs.user_errors():
        counts = sizes(lengths)
        targets = Targets(json, output, plot, report_file)
        common: dict[str, Any] = dict(
            tokens=max(counts), checkpoint=model, sink=sink, window=window
        )
        configs = over_budgets(settings, sizes(budgets), **common)
        texts = read_documents(documents)
        plan = NeedlesPlan(configs, counts, prompts, facts, seed, decode)
        python = {CODE: f"{CODE} of Python {python_version()}"}
        names = ", ".join(python.get(name, name) for name in texts)
        asked = dict(prompts=prompts, facts=facts, seed=seed, decode=decode)
        details = measured_on(model, names, dtype, configs, **asked)
        digests = {name: digest(text) for name, text in texts.items()}
        kept = targets.kept("needles", **details, lengths=counts, device=device, texts=digests)
    loaded, tokenizer, _ = inputs.load_to_measure(model, device, "", dtype)
    tokens = {name: encode(tokenizer, text) for name, text in texts.items()}
    for name, ids in tokens.items():
        if prompts * max(counts) > len(ids):
            overlap = f"the windows of the {prompts} prompts overlap, with other facts each"
            report.notes.print(f"{name} has {len(ids):,} tokens: {overlap}")
    with kept, inputs.user_errors():
        rows = needles_rows(loaded, tokenizer, tokens, plan, kept)
    what = f"digits right of {facts} pass keys asked for at once"
    title = f"Needles: {what}, answers with the 95 % interval; {names}"
    targets.publish("needles", title, rows, details, kept)
