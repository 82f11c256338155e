"""Pass keys in notes, as the demo checkpoint knows them: one note in a document, or eight of which one is asked for."""

from __future__ import annotations

import random
from typing import Any

from hip_hf.eval.measure.documents import DIGITS, NAMES, note, question
from hip_hf.eval.tasks.common import Prompt, build, draw_sentences, insert, read_plan, scatter

ANSWER_TOKENS = 16


def render(units: list[str], facts: list[tuple[str, str]], places: list[int], asked: int) -> Prompt:
    """A document of `units` with the facts (name, key) noted at `places`, and the question for one of them."""
    text = "".join(insert(units, [note(*fact) for fact in facts], places))
    words, _, prefix = question(facts[asked][0]).partition("? ")
    return Prompt(f"{text.rstrip()}\n{words.strip()}?", prefix, [facts[asked][1]])


def notes(task: str, count: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """Documents with `count` notes."""
    haystack = read_plan(metadata).haystack

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        names = rng.sample(NAMES, count)
        facts = [(name, "".join(rng.choices("0123456789", k=DIGITS))) for name in names]
        asked = rng.randrange(count)
        return render(draw_sentences(haystack, rng, size), facts, scatter(rng, size, count), asked)

    return build(task, make, ANSWER_TOKENS, metadata)


def passkey(**metadata: Any) -> dict[str, Any]:
    return notes("passkey", 1, metadata)


def passkeys(**metadata: Any) -> dict[str, Any]:
    return notes("passkeys", 8, metadata)
