"""The demo checkpoint, and documents with hidden facts: what the demo, the pass-key test and
training share."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

ASSETS = Path(__file__).parents[2] / "assets"
CHECKPOINT = ASSETS / "checkpoint"
DOCUMENT = ASSETS / "document.txt"  # held out from training
_NAMES = """
    amber anchor apple arrow badger banjo basil beacon birch bison bronze cactus camel canyon cedar
    cobalt comet copper coral cricket dragon ember falcon fern fiddle ginger glacier granite harbor
    hazel heron indigo iris ivory jade jasper kettle lantern lemon lotus magnet maple marble meteor
    mint nickel olive onyx orchid otter panda pearl pepper pigeon quartz raven saffron salmon tiger
    topaz tulip velvet walnut zebra
"""
FACT_NAMES = _NAMES.split()
DIGITS = 5


@dataclass(frozen=True)
class Fact:
    """A pass key hidden in a document at `depth`, 0 (its beginning) to 1 (its end)."""

    name: str
    key: str
    depth: float


def draw_digits(rng: random.Random) -> str:
    """A pass key: `DIGITS` random digits."""
    return "".join(rng.choices("0123456789", k=DIGITS))


def note_sentence(name: str, key: str) -> str:
    """The sentence that hides a fact."""
    return f"\nThe pass key of {name} is {key}. Remember it.\n"


def question(name: str) -> str:
    """The question, up to where the answer begins."""
    return f"\nWhat is the pass key of {name}? The pass key of {name} is"


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text of any length, and none around them."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def hide(
    tokenizer: Any, text: list[int], length: int, facts: list[Fact], end: list[int]
) -> list[int]:
    """A document of exactly `length` tokens: `text` (token ids) with the facts hidden in it, and
    `end` (token ids) after it. Raises ValueError if `text` is too short, or notes and `end` alone
    are longer than `length`."""
    hidden = sorted(facts, key=lambda fact: fact.depth)
    notes = [(fact.depth, encode(tokenizer, note_sentence(fact.name, fact.key))) for fact in hidden]
    room = length - len(end) - sum(len(ids) for _, ids in notes)
    if not 0 <= room <= len(text):
        least = length - room
        allowed = f"{least} (notes and question) to {least + len(text)}"
        raise ValueError(f"length: got {length}, allowed: {allowed}")
    prompt, read = list[int](), 0
    for depth, ids in notes:
        upto = round(depth * room)
        prompt += text[read:upto] + ids
        read = upto
    return prompt + text[read:room] + end


def make_prompt(
    tokenizer: Any, text: list[int], length: int, facts: list[Fact], ask: str
) -> list[int]:
    """A document of exactly `length` tokens: `text` (token ids) with the facts hidden in it, and
    the question at its end. Raises ValueError if `text` is too short, or notes and question alone
    are longer than `length`."""
    return hide(tokenizer, text, length, facts, encode(tokenizer, question(ask)))


def answer_of(tokenizer: Any, ids: torch.Tensor | list[int]) -> str:
    """Return the digits with which the generated tokens `ids` `[n]` begin."""
    return "".join(takewhile(str.isdigit, tokenizer.decode(ids).strip()))


def digest(text: str) -> str:
    """A name for a text that another text does not have."""
    return hashlib.sha256(text.encode()).hexdigest()


def load(checkpoint: str | Path, attn: str, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint (a hub name or a folder). `dtype`: of the weights, or
    "auto"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    options = dict(attn_implementation=attn, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval(), tokenizer
