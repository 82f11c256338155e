"""Perplexity of a local file by position: the same passages, with more and more of the text before
them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from hip_hf.eval.tasks.common import SYNTHETIC, read_haystack, read_plan
from hip_hf.integration.lm_eval.registration import UsageError

TARGET_WORDS = 128


def perplexity(**metadata: Any) -> dict[str, Any]:
    """Passages of `TARGET_WORDS` words; for each length, as much of the text before them as fits.
    Raises UsageError if the haystack is not a file, or is shorter than the longest length."""
    import datasets

    plan = read_plan(metadata)
    if plan.haystack == SYNTHETIC:
        allowed = "a text file (random words have no perplexity worth knowing)"
        raise UsageError(f"haystack: got {SYNTHETIC!r}, allowed: {allowed}")
    text = read_haystack(plan.haystack)
    words = text.split(" ")
    density = plan.tokens(text) / len(words)
    # the longest context in words, and a tenth for where the text is sparser in tokens
    before = math.ceil(1.1 * max(plan.lengths) / density)
    if before + TARGET_WORDS > len(words):
        room = math.floor((len(words) - TARGET_WORDS) * density / 1.1)
        allowed = f"up to about {room} in {plan.haystack}"
        raise UsageError(f"max_seq_lengths: got {max(plan.lengths)}, allowed: {allowed}")
    rows = []
    for length, index in itertools.product(plan.lengths, range(plan.samples)):
        rng = random.Random(f"perplexity {plan.seed} {index}")
        at = rng.randrange(before, len(words) - TARGET_WORDS + 1)
        target = " " + " ".join(words[at : at + TARGET_WORDS])
        context, tokens = _context(plan, words, at, target, length)
        texts = {"context": context, "target": target, "tokens": tokens}
        rows.append({**texts, "index": index, "max_length": length})
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


def _context(plan: Any, words: Sequence[str], at: int, target: str, length: int) -> tuple[str, int]:
    """The text before word `at` that fills `length` tokens together with the target, and the tokens
    of the target."""
    size = min(at, length)  # a word is a token at least
    while size > 0:
        context = " ".join(words[at - size : at])
        total = plan.tokens(context + target)
        if total <= length:
            return context, total - plan.tokens(context)
        size = min(size - 1, math.floor(size * length / total))
    allowed = f"more than the {TARGET_WORDS} words that are scored"
    raise UsageError(f"max_seq_lengths: got {length}, allowed: {allowed}")


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The mean negative log-likelihood of a token, in nats; `exp` of it is the perplexity."""
    loss = -results[0][0] / doc["tokens"]
    return {"nll": loss, "perplexity": loss, f"nll_{doc['max_length']}": loss}


def exp_of_mean(losses: Sequence[float]) -> float:
    return math.exp(math.fsum(losses) / len(losses))
