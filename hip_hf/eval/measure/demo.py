"""Pass keys hidden in a long document, asked for with dense and with pruned attention: the
measuring part of `hip-hf demo`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from hip_hf.attention import attend
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import documents, generate, losses
from hip_hf.eval.measure.capture import capture
from hip_hf.eval.measure.documents import FACT_NAMES, Fact, draw_digits, encode
from hip_hf.eval.measure.memory import memory_mib
from hip_hf.eval.measure.needles import NeedlesAnswer, NeedlesPrompt
from hip_hf.eval.measure.passkey import density, digits_right
from hip_hf.eval.reporting import plots
from hip_hf.geometry import query_blocks
from hip_hf.integration.explain import Report
from hip_hf.integration.model_checks import attention_layers
from hip_hf.problem import AttentionProblem

IMPLEMENTATIONS = ("sdpa", "hip")
# What stands for a digit in whose place a model says something else.
NO_DIGIT = "?"
_KIND = {name: index for index, name in enumerate(plots.BLOCK_KINDS)}


@dataclass(frozen=True)
class DemoRun:
    """What one process does: answer the prompts through one attention implementation."""

    checkpoint: str
    attn: str
    prompts: list[list[int]]
    new_tokens: int
    fields: dict[str, Any]
    chunk: int | None = None  # tokens of a prompt that are read at a time
    device: str = "cpu"


def answer(model: Any, tokenizer: Any, run: DemoRun, read: Callable[[int], None]) -> dict[str, Any]:
    """Answers and measurements of one implementation, whose peak of memory is right where the
    process has done nothing else. `read` is told how many tokens each forward pass has read."""
    loaded = memory_mib("VmRSS")
    results = [
        generate.generate(model, prompt, run.new_tokens, run.chunk, read) for prompt in run.prompts
    ]
    rates = [result.tokens_per_s for result in results if result.tokens_per_s is not None]
    answers = [documents.answer_of(tokenizer, result.ids) for result in results]
    texts = [tokenizer.decode(result.ids).strip() for result in results]
    return {
        "answers": answers,
        # where there are no digits, what was said instead
        "said": [digits or text for digits, text in zip(answers, texts, strict=True)],
        "first_token_s": median(result.first_token_s for result in results),
        "tokens_per_s": median(rates) if rates else None,
        "loaded_mib": loaded,
        "peak_mib": memory_mib("VmHWM"),
        "memory_mib": results[-1].memory,
        "prefill": results[-1].prefill,
        "decode": results[-1].decode,
    }


def make_facts(count: int, seed: int) -> list[Fact]:
    """Facts spread over the document: one at a random place in each `1 / count` of it."""
    rng = random.Random(seed)
    parts = enumerate(rng.sample(FACT_NAMES, count))
    return [Fact(name, draw_digits(rng), (i + rng.random()) / count) for i, name in parts]


def position_of(tokenizer: Any, prompt: list[int], fact: Fact) -> int:
    """Where the fact's note begins in the prompt."""
    ids = encode(tokenizer, documents.note_sentence(fact.name, fact.key))
    return next(at for at in range(len(prompt)) if prompt[at : at + len(ids)] == ids)


def kinds_read(
    problem: AttentionProblem, config: HiPConfig, layer: int
) -> tuple[torch.Tensor, str]:
    """What the first key head's query blocks read in prefill, `[query blocks, key blocks]` of
    `plots.BLOCK_KINDS` (-1: the future), and the path in words."""
    result = attend(problem, config, layer, need_mask=True)
    config = config.for_layer(layer)
    span, size = problem.spans[0], config.block_k
    blocks = query_blocks(config, span, per_row=False, sliding=problem.sliding_window)
    kinds = torch.full((len(blocks), -(-span.keys // size)), -1, dtype=torch.int8)
    for i, block in enumerate(blocks):
        dense = result.mask is None or block.row >= span.rows - config.dense_tail
        row, seen = kinds[i], "read densely" if dense else "not read"
        row[block.start // size : block.last // size + 1] = _KIND[seen]
        if result.mask is None:
            continue
        row[block.start // size : block.sink_end // size] = _KIND["sink"]
        row[block.window_start // size : block.last // size + 1] = _KIND["window"]
        row[result.mask.indices[0, 0, i, : result.mask.counts[0, 0, i]].long()] = _KIND["selected"]
    read = f"sparse, {result.density:.0%} of the keys read"
    return kinds, read if result.path == "sparse" else f"dense: {result.reason}"


@torch.no_grad()
def panels(model: Any, prompt: list[int], settings: HiPConfig) -> list[plots.Panel]:
    """Who reads what in a prompt, a panel for each layer, computed from the queries and keys of a
    model that attends densely."""
    found = []
    for layer, problem in enumerate(capture(model, torch.tensor([prompt]))):
        kinds, path = kinds_read(problem, settings, layer)
        at = settings.for_layer(layer)
        found.append(plots.Panel(f"layer {layer}: {path}", kinds, at.block_q, at.block_k))
    return found


def row_of(attn: str, measured: dict[str, Any], facts: list[Fact]) -> dict[str, Any]:
    """The line of the table for one implementation; `keys_read` is the prompt's, `above_model_mib`
    the peak's part that came on top of the loaded model."""
    right = sum(given == fact.key for given, fact in zip(measured["answers"], facts, strict=True))
    loaded, peak = measured["loaded_mib"], measured["peak_mib"]
    return {
        "attention": attn,
        "right": f"{right}/{len(facts)}",
        "first_token_s": measured["first_token_s"],
        "tokens_per_s": measured["tokens_per_s"],
        "peak_mib": peak,
        "above_model_mib": None if loaded is None or peak is None else peak - loaded,
        "keys_read": density(measured["prefill"]),
    }


def question_rows(facts: list[Fact], said: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Each fact and what each implementation answered."""
    return [
        {"pass_key_of": fact.name, "depth": fact.depth, "hidden": fact.key}
        | {attn: answers[i] for attn, answers in said.items()}
        for i, fact in enumerate(facts)
    ]


@dataclass
class PromptReading:
    """What one attention made of the prompt: an answer for each fact, and `explain`'s rows (none
    for PyTorch's)."""

    answers: list[str]
    first_token_s: float
    layers: Report = field(default_factory=Report)

    def row(self, attn: str, asked: Sequence[NeedlesAnswer]) -> dict[str, Any]:
        """The line of the table for this attention."""
        keys = [answer.fact.key for answer in asked]
        return {
            "attention": attn,
            "right": f"{sum(map(str.__eq__, self.answers, keys))}/{len(keys)}",
            "digits": sum(map(digits_right, self.answers, keys)) / sum(map(len, keys)),
            "first_token_s": self.first_token_s,
            "keys_read": density(self.layers),
        }


@torch.no_grad()
def read(
    model: Any, tokenizer: Any, prompt: NeedlesPrompt, advance: Callable[[], None]
) -> PromptReading:
    """Read the prompt with the attention that is set; `advance` is called after each layer."""
    layers = attention_layers(model)  # one to a layer
    hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in layers]
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
        before = hidden[torch.tensor(answer.positions) - 1]
        digits = ""
        for token, count in zip(
            losses.logits_of(model, before).argmax(1), answer.digits, strict=True
        ):
            text = tokenizer.decode([int(token)]).strip()
            digits += text if text.isdigit() and len(text) == count else NO_DIGIT * count
        answers.append(digits)
    return PromptReading(answers, seconds, generate.explained(model))
