"""`hip-hf demo`: pass keys hidden in a long document, asked for with dense and with pruned
attention.

Each implementation runs in a process of its own, so that the peak of memory is its own. Every
question is a prompt of full length; the times are the medians over the questions, which leaves out
what the first call has to set up.

With `--model` all facts are in one document. The answers stand in the prompt (see `needles`), so
the model reads once with each attention; that is also the time to its first token.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from hip_hf.cli import inputs
from hip_hf.cli.generate import memory_line, print_layers
from hip_hf.cli.publish import Json
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import demo, documents, losses, needles, real_model
from hip_hf.eval.measure.demo import IMPLEMENTATIONS, DemoRun, question_rows, row_of
from hip_hf.eval.measure.documents import FACT_NAMES, Fact, encode
from hip_hf.eval.measure.generate import lengthen
from hip_hf.eval.reporting import plots, report
from hip_hf.integration.explain import Report
from hip_hf.integration.model_checks import attention_layers

# Facts that are asked for where nothing else is said: with a prompt for each, and all at once.
FACTS, AT_ONCE = 3, 8
# Tokens of the document with all facts, where the model is made for this many.
TOKENS = 8192
# What the rows of `explain` are called in JSON, and in words.
EXPLAINED = {"explain": "hip, prompt", "explain_decode": "hip, last decode step"}
CHECKPOINT, PICTURE = str(documents.CHECKPOINT), Path("hip_demo.png")
_MODEL = (
    f"Ask this model for all facts of one document at once, answers included: {real_model.NAME}, "
    f"which is fetched into {real_model.FOLDER} ({real_model.PACKAGE}), a hub name or a folder."
)
_LENGTH = "Length of a prompt; default: the model's full length. Beyond it: hip alone."
_FACTS = (
    f"Pass keys to hide and to ask for; default: {FACTS}, each in a document of its own, with "
    f"--model {AT_ONCE} in one."
)
CHUNK = Option(help="How many tokens to read at a time beyond the model's length.", min=1)
DRAWN = Option(help="PNG file of which key blocks each query block reads.")


def load_for_demo(run: DemoRun, attn: str) -> tuple[Any, Any, HiPConfig]:
    """Return model, tokenizer and settings. The library's own progress bar is off, for the command
    shows one itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return inputs.load_or_exit(run.checkpoint, attn, run.fields)


def answer_alone(run: DemoRun) -> dict[str, Any]:
    """Answers and measurements of one implementation; call it in a fresh process."""
    model, tokenizer, _ = load_for_demo(run, run.attn)
    model.to(run.device)
    total = sum(len(prompt) + run.new_tokens - 1 for prompt in run.prompts)
    with report.counting(f"tokens, {run.attn}", total) as advance:
        return demo.answer(model, tokenizer, run, advance)


def answer_in_own_process(run: DemoRun) -> dict[str, Any]:
    """`answer_alone(run)` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(answer_alone, run).result()


def draw(file: Path, run: DemoRun, fact: Fact) -> None:
    """The picture of who reads what in the first prompt, computed from the dense model's queries
    and keys."""
    model, tokenizer, settings = load_for_demo(run, "sdpa")
    prompt = run.prompts[0]
    marks = {fact.name: demo.position_of(tokenizer, prompt, fact)}
    begins = len(prompt) - len(encode(tokenizer, documents.question(fact.name)))
    what = f"Key blocks that each query block reads (first key head), {len(prompt)} tokens"
    panels = demo.panels(model, prompt, settings)
    plots.readings(file, f"{what}; asked for: {fact.name}", panels, len(prompt), marks, begins)


def prepare(
    checkpoint: str, document: Path, tokens: int | None, facts: list[Fact]
) -> tuple[list[list[int]], int, bool]:
    """A prompt for each fact, how many tokens an answer has, and whether prompts are longer than
    the model is made for. They have `tokens` tokens; None: all that the model is made for. Beyond
    that the document is read over again."""
    from transformers import AutoConfig, AutoTokenizer

    if checkpoint == CHECKPOINT and not documents.CHECKPOINT.exists():
        line = f"{checkpoint} is not there, allowed: another checkpoint"
        raise BadParameter(line, param_hint="--checkpoint")
    with inputs.user_errors("--checkpoint", f"cannot load {checkpoint!r}: "):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        config = AutoConfig.from_pretrained(checkpoint).get_text_config(decoder=True)
    text = encode(tokenizer, inputs.read_text(document, "--document"))
    new_tokens = max(len(encode(tokenizer, f" {fact.key}")) for fact in facts)
    longest = config.max_position_embeddings - new_tokens
    tokens = longest if tokens is None else tokens
    if tokens > max(longest, len(text)) and text:
        text = lengthen(text, tokens)
    with inputs.user_errors("--tokens"):
        given = (tokenizer, text, tokens)
        prompts = [documents.make_prompt(*given, [fact], fact.name) for fact in facts]
    return prompts, new_tokens, tokens > longest


def verdicts(question: dict[str, Any]) -> dict[str, Any]:
    """A question's row for people: answers followed by right or wrong."""
    row = dict(question)
    for attn in IMPLEMENTATIONS:
        row[attn] += " (right)" if row[attn] == question["hidden"] else " (wrong)"
    return row


def conclude(
    title: str, rows: list[Any], as_json: bool, layers: list[Report], heading: str = "", **more: Any
) -> None:
    """Show a row for each attention, the `questions` of what there is `more` under a heading, and
    `layers` after the prompt and the last step."""
    if as_json:
        for name, explained in zip(EXPLAINED, layers, strict=False):
            more[name] = [asdict(layer) for layer in explained]
        report.show(title, rows, True, **more)
        return
    if heading:
        report.show(heading, [verdicts(row) for row in more["questions"]], False)
    drawn = {"picture": more["picture"]} if "picture" in more else {}
    report.show(title, rows, False, **drawn)
    for words, found in zip(EXPLAINED.values(), layers, strict=False):
        print_layers(words, found)


def show_long(run: DemoRun, facts: list[Fact], as_json: bool) -> None:
    """The demo beyond the model's length: `hip` alone, a chunk at a time. Dense attention and the
    picture, which needs it, take time quadratic in the length."""
    length = len(run.prompts[0])
    beyond = "longer than the model was made for: no right answers are to be expected"
    report.note(f"{length:,} tokens are {beyond}, and dense attention is left out")
    measured = answer_alone(run)
    row = row_of("hip", measured, facts)
    del row["peak_mib"], row["above_model_mib"]
    row |= {"tokens_per_s_prefill": length / measured["first_token_s"]}
    memory = measured["memory_mib"]
    row |= {f"{name}_mib": value for name, value in memory.items() if value is not None}
    details: dict[str, Any] = {"tokens": length, "chunk": run.chunk, "settings": run.fields}
    layers = [measured["prefill"], measured["decode"]]
    conclude(f"demo: {length:,} tokens, {run.chunk:,} at a time", [row], as_json, layers, **details)
    if not as_json:
        report.note(memory_line(memory))


def checkpoint_of(model: str) -> str:
    """The folder or hub name that `--model` means; the real model is fetched if it is not there."""
    if model != real_model.NAME:
        return model
    with inputs.user_errors("--model"):
        real_model.fetch()
    return str(real_model.FOLDER)


def show_at_once(
    model: str,
    fields: dict[str, Any],
    device: str,
    document: Path,
    tokens: int | None,
    facts: int,
    seed: int,
    as_json: bool,
) -> None:
    """The demo of a model that is asked for all facts of one document at once."""
    where = inputs.check_device(device)
    text = inputs.read_text(document, "--document")
    # what sparse attention reads is shown of a short document, too
    fields = {"dense_below": 0, **fields}
    net, tokenizer, settings = inputs.load_or_exit(checkpoint_of(model), "hip", fields)
    longest = net.config.get_text_config(decoder=True).max_position_embeddings
    length = min(TOKENS, longest) if tokens is None else tokens
    if length > longest:
        allowed = f"at most the {longest} that the model is made for"
        raise inputs.not_allowed("--tokens", length, allowed)
    ids = encode(tokenizer, text)
    with inputs.user_errors():
        prompt = needles.make_needles(tokenizer, ids, length, facts, random.Random(seed))
        losses.check_logits(net, prompt.ids)
    net.to(where)
    readings = {}
    for attn in IMPLEMENTATIONS:
        net.set_attn_implementation(attn)
        what = f"reading {length:,} tokens, layers, {attn}"
        with report.counting(what, len(attention_layers(net))) as advance:
            readings[attn] = demo.read(net, tokenizer, prompt, advance)
    rows = [reading.row(attn, prompt.answers) for attn, reading in readings.items()]
    said = {attn: reading.answers for attn, reading in readings.items()}
    questions = question_rows([answer.fact for answer in prompt.answers], said)
    title = f"demo: {facts} facts in {document.name}, {length:,} tokens, read once by {model}"
    heading = "What was hidden, and what each attention would have answered"
    details = {"questions": questions, "tokens": length, "settings": settings.to_dict()}
    conclude(title, rows, as_json, [readings["hip"].layers], heading, **details)


def main(
    checkpoint: Annotated[str, Option(help="A hub name or a folder.")] = CHECKPOINT,
    model: Annotated[str | None, Option(help=_MODEL)] = None,
    document: Annotated[Path, Option(help="Text file to hide facts in.")] = documents.DOCUMENT,
    tokens: Annotated[int | None, Option(help=_LENGTH, min=1)] = None,
    chunk: Annotated[int, CHUNK] = 8192,
    device: inputs.Device = "cpu",
    facts: Annotated[int | None, Option(help=_FACTS, min=1, max=len(FACT_NAMES))] = None,
    set_: inputs.SetFields = None,
    picture: Annotated[Path, DRAWN] = PICTURE,
    seed: Annotated[int, Option(help="Of the facts.")] = 0,
    as_json: Json = False,
) -> None:
    """Hide pass keys in a long document and ask for them: dense against pruned attention."""
    fields = inputs.parse_fields(set_)
    if model is not None:
        if checkpoint != CHECKPOINT:
            line = f"got {model!r} beside --checkpoint, allowed: one of them"
            raise BadParameter(line, param_hint="--model")
        asked = facts or AT_ONCE
        show_at_once(model, fields, device, document, tokens, asked, seed, as_json)
        return
    inputs.check_device(device)
    hidden = demo.make_facts(facts or FACTS, seed)
    prompts, new_tokens, beyond = prepare(checkpoint, document, tokens, hidden)
    if beyond:
        run = DemoRun(checkpoint, "hip", prompts[:1], new_tokens, fields, chunk, device)
        show_long(run, hidden[:1], as_json)
        return
    plots.pyplot()  # if it is missing, say so before the work
    measured = {}
    with report.progress() as bar:
        task = bar.add_task("", total=len(IMPLEMENTATIONS) + 1)
        for attn in IMPLEMENTATIONS:
            what = f"{len(hidden)} questions, {len(prompts[0])} tokens each, {attn}"
            bar.update(task, description=what)
            run = DemoRun(checkpoint, attn, prompts, new_tokens, fields, device=device)
            measured[attn] = answer_in_own_process(run)
            bar.advance(task)
        bar.update(task, description=f"drawing {picture}")
        draw(picture, DemoRun(checkpoint, "sdpa", prompts, new_tokens, fields), hidden[0])
    rows = [row_of(attn, measured[attn], hidden) for attn in IMPLEMENTATIONS]
    said = {attn: found["said"] for attn, found in measured.items()}
    questions = question_rows(hidden, said)
    title = f"demo: {len(hidden)} questions about {document.name}, {len(prompts[0])} tokens each"
    layers = [measured["hip"]["prefill"], measured["hip"]["decode"]]
    details = {"questions": questions, "picture": str(picture), "tokens": len(prompts[0])}
    conclude(title, rows, as_json, layers, "What was hidden, and what was answered", **details)
