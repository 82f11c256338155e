"""What the tasks share: metadata, the haystack, prompts of a wanted length, scoring."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hip_hf.eval.measure.documents import DOCUMENT, FACT_NAMES
from hip_hf.integration.lm_eval.registration import UsageError

SYNTHETIC = "synthetic"
# or a clause of one: the finer the units, the closer prompts come to their length
_SENTENCE = re.compile(r"[^.!?;:]+[.!?;:]*\s*")
SENTENCE_WORDS = 8  # of a synthetic sentence
FULL = 0.99  # a prompt is long enough when it fills so much of its room


@dataclass(frozen=True)
class Prompt:
    """One document of a task: the text, how the answer begins, and the strings that the answer must
    hold."""

    input: str
    gen_prefix: str
    outputs: list[str]


# Draws a prompt of about `length` tokens with `size` units of haystack: `make(rng, size, length)`.
# The same state of the generator must give the same draw.
Make = Callable[[random.Random, int, int], Prompt]


@dataclass(frozen=True)
class TaskPlan:
    """What metadata asks for."""

    lengths: tuple[int, ...]
    samples: int
    seed: int
    haystack: str
    tokenizer: Any

    def tokens(self, text: str) -> int:
        """How many tokens the model reads for `text`."""
        return len(self.tokenizer(text, verbose=False).input_ids)


@functools.cache
def load_tokenizer(name: str, revision: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    options = dict(revision=revision, trust_remote_code=trust_remote_code)
    return AutoTokenizer.from_pretrained(name, **options)


def _check_count(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name}: got {value!r}, allowed: an integer >= {low}")
    return value


def read_plan(metadata: dict[str, Any]) -> TaskPlan:
    """Return the plan in a task's metadata, which lm-eval fills with the model arguments as well;
    what is no part of a plan is left to lm-eval. Raises UsageError if a value is out of range, or
    there is no tokenizer."""
    lengths = metadata.get("max_seq_lengths", [4096])
    lengths = tuple(lengths) if isinstance(lengths, (list, tuple)) else (lengths,)
    if not lengths:
        raise UsageError("max_seq_lengths: got [], allowed: a list of token counts")
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        allowed = "a name or folder (metadata `tokenizer` or `pretrained`)"
        raise UsageError(f"tokenizer: got {name!r}, allowed: {allowed}")
    revision, trust = metadata.get("revision", "main"), metadata.get("trust_remote_code", False)
    return TaskPlan(
        lengths=tuple(_check_count("max_seq_lengths", length, 1) for length in lengths),
        samples=_check_count("samples", metadata.get("samples", 50), 1),
        seed=_check_count("data_seed", metadata.get("data_seed", 0), 0),
        haystack=str(metadata.get("haystack") or DOCUMENT),
        tokenizer=load_tokenizer(name, str(revision), bool(trust)),
    )


def read_haystack(file: str, allowed: str = "a text file") -> str:
    """The text of a haystack. Raises UsageError if it cannot be read."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"haystack: got {file!r} ({error}), allowed: {allowed}") from None


@functools.cache
def sentences(file: str) -> list[str]:
    """The sentences of a text file, each with the white space after it. Raises UsageError if it
    cannot be read or is empty."""
    allowed = f"a text file or {SYNTHETIC!r}"
    found = _SENTENCE.findall(read_haystack(file, allowed))
    if not any(sentence.strip() for sentence in found):
        raise UsageError(f"haystack: got {file!r}, which is empty, allowed: {allowed}")
    return found


def draw_sentences(haystack: str, rng: random.Random, size: int) -> list[str]:
    """`size` consecutive sentences from a random place (the file's beginning follows its end), or
    random ones."""
    if haystack == SYNTHETIC:
        drawn = [" ".join(rng.choices(FACT_NAMES, k=SENTENCE_WORDS)) for _ in range(size)]
        return [sentence.capitalize() + ". " for sentence in drawn]
    text = sentences(haystack)
    start = rng.randrange(len(text))
    return [text[(start + i) % len(text)] for i in range(size)]


def insert(units: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """`units` with a needle before each of the `places` (0 to `len(units)`, in rising order)."""
    out: list[str] = []
    at = 0
    for needle, place in zip(needles, places, strict=True):
        out += [*units[at:place], needle]
        at = place
    return out + list(units[at:])


def scatter(rng: random.Random, size: int, count: int) -> list[int]:
    """`count` places in a haystack of `size` units, in rising order, different while there are
    enough."""
    places = range(size + 1)
    enough = count <= len(places)
    return sorted(rng.sample(places, count) if enough else rng.choices(places, k=count))


def fit(
    tokens: Callable[[int], int], room: int, guess: int, smallest: int, largest: float = math.inf
) -> int:
    """A size up to `largest` for which `tokens(size) <= room`: the largest one, or one that fills
    `FULL` of the room. Raises UsageError if not even the smallest fits."""
    good, bad, size = smallest - 1, largest + 1, max(guess, smallest)
    while True:
        count = tokens(size)
        if count > room:
            bad = size
        else:
            good = size
        if bad <= smallest:
            got = f"room for {room} tokens of prompt"
            raise UsageError(f"max_seq_lengths: got {got}, allowed: at least {count} for this task")
        if bad - good <= 1 or FULL * room <= count <= room:
            return good
        # tokens are nearly proportional to the size; what must change, changes
        size = math.ceil(max(size, 1) * room / count)
        size = int(min(max(size, good + 1), bad - 1))


def build(
    task: str,
    make: Make,
    answer: int,
    metadata: dict[str, Any],
    delimiter: str = " ",
    smallest: int = 0,
    largest: float = math.inf,
) -> dict[str, Any]:
    """The test split of a task: for each sample and length a prompt that leaves `answer` tokens for
    the answer.

    Length by length: processes take documents in turn, and lengths that took turns as well could
    leave one of them without any document of some length, at which lm-eval fails.
    """
    import datasets

    plan, rows, size = read_plan(metadata), [], smallest

    def draw(length: int, index: int, size: int) -> Prompt:
        return make(random.Random(f"{task} {plan.seed} {length} {index}"), size, length)

    def tokens(length: int, index: int, size: int) -> int:
        prompt = draw(length, index, size)
        return plan.tokens(prompt.input + delimiter + prompt.gen_prefix)

    for length, index in itertools.product(plan.lengths, range(plan.samples)):
        counted = functools.partial(tokens, length, index)
        size = fit(counted, length - answer, size, smallest, largest)
        lengths = {"index": index, "length": counted(size) + answer, "max_length": length}
        rows.append(vars(draw(length, index, size)) | lengths)
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the wanted strings that the answer holds, whatever their case: RULER's score."""
    said = results[0].lower()
    score = sum(want.lower() in said for want in doc["outputs"]) / len(doc["outputs"])
    return {"acc": score, str(doc["max_length"]): score}
