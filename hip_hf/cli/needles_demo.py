"""`hip-hf demo --model`: many facts in one document, asked of a real model with dense and with pruned attention.

The answers stand in the prompt (see `needles`), so the model reads once with each attention; that is also the time to its
first token.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import typer

from hip_hf.cli import inputs
from hip_hf.cli.generate import print_layers
from hip_hf.eval.measure import losses, needles, real_model
from hip_hf.eval.measure.needles import NeedlesPrompt
from hip_hf.eval.measure.needles_demo import IMPLEMENTATIONS, TOKENS, read
from hip_hf.eval.reporting import report
from hip_hf.integration.model_checks import attention_layers


def verdicts(question: dict[str, Any]) -> dict[str, Any]:
    """A question's row for people: answers followed by right or wrong."""
    said = {attn: question[attn] for attn in IMPLEMENTATIONS}
    return {
        **question,
        **{attn: f"{given} ({'right' if given == question['hidden'] else 'wrong'})" for attn, given in said.items()},
    }


def checkpoint_of(model: str) -> str:
    """The folder or hub name that `--model` means; the real model is fetched if it is not there yet."""
    if model != real_model.NAME:
        return model
    try:
        real_model.fetch()
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    return str(real_model.FOLDER)


def prompt_of(model: Any, tokenizer: Any, text: str, tokens: int | None, facts: int, seed: int) -> NeedlesPrompt:
    """The prompt; `tokens`: its length, None: `TOKENS`, or as many as the model is made for."""
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    tokens = min(TOKENS, longest) if tokens is None else tokens
    if tokens > longest:
        message = f"got {tokens}, allowed: at most the {longest} that the model is made for"
        raise typer.BadParameter(message, param_hint="--tokens")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    try:
        prompt = needles.make_prompt(tokenizer, ids, tokens, facts, random.Random(seed))
        losses.check_logits(model, prompt.ids)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return prompt


def show(
    model: str, document: Path, tokens: int | None, facts: int, fields: dict[str, Any], device: str, seed: int, as_json: bool
) -> None:
    """The demo: tables, or one JSON document."""
    where = inputs.check_device(device)
    text = inputs.read_text(document, "--document")
    net, tokenizer, settings = inputs.load(checkpoint_of(model), "hip", fields)
    prompt = prompt_of(net, tokenizer, text, tokens, facts, seed)
    net.to(where)
    readings = {}
    with report.progress() as bar:
        for attn in IMPLEMENTATIONS:
            net.set_attn_implementation(attn)
            task = bar.add_task(f"reading {len(prompt.ids):,} tokens, layers, {attn}", total=len(attention_layers(net)))
            readings[attn] = read(net, tokenizer, prompt, partial(bar.advance, task))
    rows = [reading.row(attn, prompt.answers) for attn, reading in readings.items()]
    questions = [
        {
            "pass_key_of": answer.fact.name,
            "depth": answer.fact.depth,
            "hidden": answer.fact.key,
            **{attn: reading.answers[i] for attn, reading in readings.items()},
        }
        for i, answer in enumerate(prompt.answers)
    ]
    title = f"demo: {facts} facts in {document.name}, {len(prompt.ids):,} tokens, read once by {model}"
    layers = readings["hip"].layers
    if as_json:
        details = {"tokens": len(prompt.ids), "settings": settings.to_dict(), "explain": [asdict(layer) for layer in layers]}
        report.show(title, rows, True, questions=questions, **details)
        return
    report.show("What was hidden, and what each attention would have answered", [verdicts(row) for row in questions], False)
    report.show(title, rows, False)
    print_layers("hip, prompt", layers)
