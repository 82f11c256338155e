"""`hip-hf demo --model`: many facts in one document, asked of a real model with dense and with pruned attention.

The answers stand in the prompt (see `needles`), so the model reads once with each attention; that is also the time to its
first token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import typer

from hip_hf.eval import generate, needles
from hip_hf.eval.measure import documents, losses, real_model
from hip_hf.eval.needles import Answer, Prompt
from hip_hf.eval.passkey import digits_right
from hip_hf.eval.reporting import report
from hip_hf.integration.explain import Report
from hip_hf.integration.reach import attention_layers

IMPLEMENTATIONS = ("sdpa", "hip")
# The document's length where the model is made for so many tokens, and how many facts are in it.
TOKENS, FACTS = 8192, 8
# What stands for a digit in whose place a model says something else.
NO_DIGIT = "?"


@dataclass
class Reading:
    """What one attention made of the prompt: an answer for each fact, and `explain`'s rows (none for PyTorch's)."""

    answers: list[str]
    first_token_s: float
    layers: Report = field(default_factory=Report)

    def row(self, attn: str, asked: Sequence[Answer]) -> dict[str, Any]:
        """The line of the table for this attention."""
        keys = [answer.fact.key for answer in asked]
        shares = [layer.share for layer in self.layers if layer.share is not None]
        return {
            "attention": attn,
            "right": f"{sum(map(str.__eq__, self.answers, keys))}/{len(keys)}",
            "digits": sum(map(digits_right, self.answers, keys)) / sum(map(len, keys)),
            "first_token_s": self.first_token_s,
            "keys_read": fmean(shares) if shares else 1.0,
        }


def verdicts(question: dict[str, Any]) -> dict[str, Any]:
    """A question's row for people: answers followed by right or wrong."""
    said = {attn: question[attn] for attn in IMPLEMENTATIONS}
    return {
        **question,
        **{attn: f"{given} ({'right' if given == question['hidden'] else 'wrong'})" for attn, given in said.items()},
    }


@torch.no_grad()
def read(model: Any, tokenizer: Any, prompt: Prompt, advance: Callable[[], None]) -> Reading:
    """Read the prompt with the attention that is set; `advance` is called after each layer."""
    hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in attention_layers(model)]  # one to a layer
    try:
        start = time.perf_counter()
        hidden = losses.hidden_of(model, prompt.ids)
        int(losses.logits_of(model, hidden[-1:]).argmax())  # the first token is there
        seconds = time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()
    answers = []
    for answer in prompt.answers:
        tokens = losses.logits_of(model, hidden[torch.tensor(answer.positions) - 1]).argmax(1).tolist()
        said = [tokenizer.decode([token]).strip() for token in tokens]
        places = zip(said, answer.digits, strict=True)
        answers.append("".join(text if text.isdigit() and len(text) == count else NO_DIGIT * count for text, count in places))
    return Reading(answers, seconds, generate.layers_of(model))


def checkpoint_of(model: str) -> str:
    """The folder or hub name that `--model` means; the real model is fetched if it is not there yet."""
    if model != real_model.NAME:
        return model
    try:
        real_model.fetch()
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    return str(real_model.FOLDER)


def prompt_of(model: Any, tokenizer: Any, text: str, tokens: int | None, facts: int, seed: int) -> Prompt:
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
    where = documents.check_device(device)
    text = documents.read_text(document, "--document")
    net, tokenizer, settings = generate.load(checkpoint_of(model), "hip", fields)
    prompt = prompt_of(net, tokenizer, text, tokens, facts, seed)
    net.to(where)
    readings = {}
    with report.progress() as bar:
        for attn in IMPLEMENTATIONS:
            net.set_attn_implementation(attn)
            task = bar.add_task(f"reading {len(prompt.ids):,} tokens, layers, {attn}", total=len(attention_layers(net)))
            readings[attn] = read(net, tokenizer, prompt, lambda task=task: bar.advance(task))
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
    generate.print_layers("hip, prompt", layers)
