"""Hide a pass key at every depth of a long document, ask for it, and count the answers that are
right."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist, fmean
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import (
    DIGITS,
    FACT_NAMES,
    Fact,
    answer_of,
    draw_digits,
    make_prompt,
)
from hip_hf.eval.reporting.resumable import Resumable, Rows
from hip_hf.integration.api import configure
from hip_hf.integration.explain import Row, explain

# An answer is a space and one token per digit; tokenizers that need fewer stop earlier or say more,
# which is cut off.
ANSWER_TOKENS = DIGITS + 1


def draw_facts(rng: random.Random, depths: list[float]) -> list[Fact]:
    """A fact with its own name and key for each depth."""
    keys = [draw_digits(rng) for _ in depths]
    names = rng.sample(FACT_NAMES, len(depths))
    return [Fact(*fact) for fact in zip(names, keys, depths, strict=True)]


def make_sample(
    tokenizer: Any, text: list[int], length: int, depth: float, facts: int, rng: random.Random
) -> tuple[list[int], str]:
    """A prompt that leaves room for its answer within `length` tokens, and the key that it asks
    for.

    The document is a random window of `text`. `facts - 1` other facts are hidden at random depths.
    """
    room = length - ANSWER_TOKENS
    start = rng.randrange(max(len(text) - room, 0) + 1)
    hidden = draw_facts(rng, [depth, *(rng.random() for _ in range(facts - 1))])
    asked = hidden[0]
    prompt = make_prompt(tokenizer, text[start : start + room], room, hidden, asked.name)
    return prompt, asked.key


def digits_right(answer: str, key: str) -> int:
    """How many digits of the key the answer has in their place."""
    return sum(a == b for a, b in zip(answer, key, strict=False))


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a proportion."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, spread = right + z * z / 2, z * math.sqrt(right * (count - right) / count + z * z / 4)
    return (centre - spread) / (count + z * z), (centre + spread) / (count + z * z)


def path_of(rows: Sequence[Row]) -> str:
    """`sparse`, `dense`, or how many layers went which way and why; `sdpa` where `explain` had
    nothing to say."""
    kinds = [row.path if row.path == "sparse" else f"{row.path} ({row.reason})" for row in rows]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    if len(counts) <= 1:
        return next(iter(counts), "sdpa")
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def density(rows: Sequence[Row]) -> float:
    """Keys read of those visible, as the mean of the layers; 1 where no layer counted them."""
    densities = [row.share for row in rows if row.share is not None]
    return fmean(densities) if densities else 1.0


@dataclass
class PasskeyCounts:
    """What was counted at one length and depth with one setting."""

    samples: int = 0
    exact: int = 0
    digits: int = 0
    prefill: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)

    def __add__(self, other: PasskeyCounts) -> PasskeyCounts:
        names = self.__dataclass_fields__
        return PasskeyCounts(*(getattr(self, name) + getattr(other, name) for name in names))

    @classmethod
    def read(cls, saved: dict[str, Any]) -> PasskeyCounts:
        """The counts as they were kept."""
        rows = {phase: [Row(**row) for row in saved[phase]] for phase in ("prefill", "decode")}
        return cls(**{**saved, **rows})

    def row(self, settings: str, length: int, depth: float | None) -> dict[str, Any]:
        """One row of the report; no `depth` means all of them."""
        low, high = wilson(self.exact, self.samples)
        caches = ", ".join(dict.fromkeys(row.cache for row in self.decode))
        return {
            "settings": settings,
            "length": length,
            "depth": "all" if depth is None else f"{depth:.2f}",
            "accuracy": self.exact / self.samples,
            "low": low,
            "high": high,
            "digits": self.digits / (self.samples * DIGITS),
            "samples": self.samples,
            "read_prefill": density(self.prefill),
            "read_decode": density(self.decode),
            "path_prefill": path_of(self.prefill),
            "path_decode": path_of(self.decode),
            "cache": caches or "-",
        }


def use(model: Any, config: HiPConfig) -> bool:
    """Let the model attend by these settings; `dense` goes through PyTorch's SDPA. Whether
    `explain` has something to say."""
    sparse = config.method != "dense"
    model.set_attn_implementation("hip" if sparse else "sdpa")
    if sparse:
        configure(model, config)
    return sparse


def answer_samples(
    model: Any, tokenizer: Any, samples: list[tuple[list[int], str]], sparse: bool
) -> PasskeyCounts:
    """Generate the answers of a batch of prompts of one length, greedily, and count what is
    right."""
    ids = torch.tensor([prompt for prompt, _ in samples], device=model.device)
    told: list[list[Row]] = []  # by `explain`, in prefill and in each decode step

    def witness(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        told.append(explain(model))
        return scores

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    given = dict(attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS)
    told_by = [witness] if sparse else []
    out = model.generate(ids, **given, do_sample=False, pad_token_id=pad, logits_processor=told_by)
    answers = [answer_of(tokenizer, tokens)[:DIGITS] for tokens in out[:, ids.shape[1] :]]
    keys = [key for _, key in samples]
    exact, digits = (sum(map(same, answers, keys)) for same in (str.__eq__, digits_right))
    prefill, decode = told[0] if told else [], told[-1] if told[1:] else []
    return PasskeyCounts(len(keys), exact, digits, prefill, decode)


@dataclass(frozen=True)
class PasskeyPlan:
    """What to ask: `samples` prompts for each setting, length and depth, the same ones whatever the
    settings."""

    configs: dict[str, HiPConfig]
    lengths: Sequence[int]
    depths: int = 11
    samples: int = 10
    facts: int = 1
    batch: int = 4
    seed: int = 0

    @property
    def places(self) -> list[float]:
        """Evenly spaced depths."""
        return [i / (self.depths - 1) for i in range(self.depths)] if self.depths > 1 else [0.5]

    def prompts(
        self, tokenizer: Any, text: list[int], length: int, place: float
    ) -> list[tuple[list[int], str]]:
        """Prompts and keys of one length and depth. Raises ValueError for a length that does not
        fit the text."""
        seeds = [f"{self.seed} {length} {place:.6f} {i}" for i in range(self.samples)]
        given = (tokenizer, text, length, place, self.facts)
        return [make_sample(*given, random.Random(seed)) for seed in seeds]


def passkey_rows(
    model: Any, tokenizer: Any, text: list[int], plan: PasskeyPlan, kept: Resumable
) -> Rows:
    """The rows of the report, of what `kept` has not yet. Raises ValueError if a length does not
    fit the text."""
    kept.expect("pass keys", len(plan.configs) * len(plan.lengths) * plan.depths)
    rows = []
    for name, config in plan.configs.items():
        sparse = use(model, config)
        for length in plan.lengths:

            def count(place: float, length: int = length, sparse: bool = sparse) -> PasskeyCounts:
                prompts, found = plan.prompts(tokenizer, text, length, place), PasskeyCounts()
                for first in range(0, len(prompts), plan.batch):
                    some = prompts[first : first + plan.batch]
                    found += answer_samples(model, tokenizer, some, sparse)
                return found

            counted = {}
            for place in plan.places:
                key = ("passkey", config.to_dict(), length, place)
                counted[place] = PasskeyCounts.read(kept.get(key, partial(count, place)))
            rows.append(sum(counted.values(), PasskeyCounts()).row(name, length, None))
            rows += [cell.row(name, length, place) for place, cell in counted.items()]
    return rows
