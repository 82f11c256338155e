"""Many facts in one document, asked of a real model with dense and with pruned attention: what `hip-hf demo --model` measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from hip_hf.eval.measure import generate, losses
from hip_hf.eval.measure.needles import NeedlesAnswer, NeedlesPrompt
from hip_hf.eval.measure.passkey import digits_right
from hip_hf.integration.explain import Report
from hip_hf.integration.model_checks import attention_layers

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

    def row(self, attn: str, asked: Sequence[NeedlesAnswer]) -> dict[str, Any]:
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


@torch.no_grad()
def read(model: Any, tokenizer: Any, prompt: NeedlesPrompt, advance: Callable[[], None]) -> Reading:
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
