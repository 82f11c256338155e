"""Kinds of looking back: pass keys in notes, values in a JSON object, passages that go on."""

from __future__ import annotations

import json
import random
import uuid
from typing import Any

from hip_hf.eval.measure.documents import FACT_NAMES, draw_digits, note_sentence, question
from hip_hf.eval.tasks.common import Prompt, build, draw_sentences, insert, read_plan, scatter

PASSKEY_TOKENS, VALUE_TOKENS, COPY_TOKENS = 16, 64, 48
# Words of a passage that the prompt repeats, and that the answer has to go on with.
GIVEN, WANTED = 12, 12


def render_notes(
    units: list[str], facts: list[tuple[str, str]], places: list[int], asked: int
) -> Prompt:
    """A document of `units` with the facts (name, key) noted at `places`, and the question for one
    of them."""
    text = "".join(insert(units, [note_sentence(*fact) for fact in facts], places))
    words, _, prefix = question(facts[asked][0]).partition("? ")
    return Prompt(f"{text.rstrip()}\n{words.strip()}?", prefix, [facts[asked][1]])


def note_documents(task: str, count: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """Documents with `count` notes, as the demo checkpoint knows them; one is asked for."""
    haystack = read_plan(metadata).haystack

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        names = rng.sample(FACT_NAMES, count)
        facts = [(name, draw_digits(rng)) for name in names]
        asked, units = rng.randrange(count), draw_sentences(haystack, rng, size)
        return render_notes(units, facts, scatter(rng, size, count), asked)

    return build(task, make, PASSKEY_TOKENS, metadata)


def passkey(**metadata: Any) -> dict[str, Any]:
    return note_documents("passkey", 1, metadata)


def passkeys(**metadata: Any) -> dict[str, Any]:
    return note_documents("passkeys", 8, metadata)


def identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def key_value(**metadata: Any) -> dict[str, Any]:
    """A JSON object of random identifiers (after Liu et al., *Lost in the Middle*); one key is
    asked for."""

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        asked, place = (identifier(rng), identifier(rng)), rng.random()
        pairs = [(identifier(rng), identifier(rng)) for _ in range(size)]
        pairs.insert(round(place * size), asked)
        (key, value), listing = asked, json.dumps(dict(pairs), indent=0)
        words = f"Each line of this JSON object gives a key and its value.\n{listing}\n"
        asks = f'Which value belongs to the key "{key}"?'
        return Prompt(words + asks, f'The value of "{key}" is', [value])

    return build("key_value", make, VALUE_TOKENS, metadata)


def copying(**metadata: Any) -> dict[str, Any]:
    """A passage of the document begins again at its end; how many of the next words are right."""
    haystack = read_plan(metadata).haystack

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        place = rng.random()
        words = "".join(draw_sentences(haystack, rng, size)).split(" ")
        # split at blanks only: line breaks stay in the words, as they stand in the text
        start = round(place * (len(words) - GIVEN - WANTED))
        passage = words[start : start + GIVEN + WANTED]
        return Prompt(" ".join(words).rstrip() + "\n\n", " ".join(passage[:GIVEN]), passage[GIVEN:])

    return build("copying", make, COPY_TOKENS, metadata, delimiter="", smallest=8)


def words_in_order(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the wanted words that the answer begins with, up to the first that is wrong."""
    said, right = results[0].split(), 0
    wanted = " ".join(doc["outputs"]).split()
    while right < min(len(said), len(wanted)) and said[right] == wanted[right]:
        right += 1
    return {"acc": right / len(wanted), str(doc["max_length"]): right / len(wanted)}
