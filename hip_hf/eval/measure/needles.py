"""Many facts in one document, all asked for at its end, in one forward pass per prompt and setting.

The answers stand in the prompt (teacher forcing), so nothing is generated: each of their digits is
held against what the model would have said before it read it. That is some ten times cheaper than
generation, and a model that is too small to answer by itself still shows what it has found.
"""

from __future__ import annotations

import math
import random
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.costs import prompt_cost
from hip_hf.eval.measure.documents import DOCUMENT, Fact, encode, hide, question
from hip_hf.eval.measure.losses import StepLosses, check_logits, losses_of
from hip_hf.eval.measure.passkey import density, draw_facts, path_of, use, wilson
from hip_hf.eval.reporting.resumable import Resumable, Rows
from hip_hf.integration.explain import explain

NOVEL, CODE = "novel", "code"
# The first share of a document holds no fact: what the sink reads anyway finds nothing there.
FREE = 0.02


@dataclass(frozen=True)
class NeedlesAnswer:
    """Where a fact's answer stands in a prompt: `[positions]` of its tokens and how many digits
    each of them has."""

    fact: Fact
    positions: tuple[int, ...]
    digits: tuple[int, ...]


@dataclass(frozen=True)
class NeedlesPrompt:
    """A document with facts hidden in it, of `document` tokens, and after it all questions with
    their answers."""

    ids: list[int]
    document: int
    answers: list[NeedlesAnswer]


def make_needles(
    tokenizer: Any, text: list[int], length: int, facts: int, rng: random.Random
) -> NeedlesPrompt:
    """A prompt of exactly `length` tokens from the beginning of `text` (token ids).

    A fact lies at a random place in each equal part of the document, the first `FREE` of it left
    out. They are asked for in another, random order. Raises ValueError if `text` is too short, or
    notes and questions alone are longer than `length`."""
    depths = [FREE + (1 - FREE) * (part + rng.random()) / facts for part in range(facts)]
    hidden, end, places = draw_facts(rng, depths), list[int](), []
    for fact in rng.sample(hidden, facts):
        end += encode(tokenizer, question(fact.name))
        tokens = encode(tokenizer, f" {fact.key}")
        digits = [sum(char.isdigit() for char in tokenizer.decode([token])) for token in tokens]
        places.append((fact, {len(end) + i: count for i, count in enumerate(digits) if count}))
        end += tokens + encode(tokenizer, ".")
    document = length - len(end)
    answers = [
        NeedlesAnswer(fact, tuple(document + at for at in own), tuple(own.values()))
        for fact, own in places
    ]
    return NeedlesPrompt(hide(tokenizer, text, length, hidden, end), document, answers)


@dataclass
class NeedlesCounts:
    """What was counted with one setting: `nll` and `document_nll` are sums in nats, over `digits`
    and `tokens`."""

    prompts: int = 0
    answers: int = 0
    exact: int = 0
    digits: int = 0
    right: int = 0
    nll: float = 0.0
    tokens: int = 0
    document_nll: float = 0.0
    read: list[float] = field(default_factory=list)  # a density for each prompt
    paths: list[str] = field(default_factory=list)

    def __add__(self, other: NeedlesCounts) -> NeedlesCounts:
        names = self.__dataclass_fields__
        return NeedlesCounts(*(getattr(self, name) + getattr(other, name) for name in names))

    def row(self, settings: str, length: int, document: str) -> dict[str, Any]:
        """One row of the report."""
        low, high = wilson(self.exact, self.answers)
        return {
            "settings": settings,
            "length": length,
            "document": document,
            "digits": self.right / self.digits,
            "answers_right": self.exact / self.answers,
            "low": low,
            "high": high,
            "nll": self.nll / self.digits,
            "perplexity": math.exp(self.document_nll / self.tokens),
            "read": fmean(self.read),
            "path": ", ".join(dict.fromkeys(self.paths)),
            "prompts": self.prompts,
            "answers": self.answers,
        }


def right_tokens(right: torch.Tensor, answers: Sequence[NeedlesAnswer]) -> list[list[bool]]:
    """Whether each digit token of each answer is the likeliest. `right`: `[tokens - 1]`, of every
    token but the first."""
    return [[bool(right[at - 1]) for at in answer.positions] for answer in answers]


@torch.no_grad()
def read_needles(
    model: Any, prompt: NeedlesPrompt, config: HiPConfig, steps: StepLosses | None = None
) -> NeedlesCounts:
    """Read a prompt once, with these settings, and count what is right in it; by `steps`: what
    comes after the document token by token."""
    sparse = use(model, config)
    if steps is None:
        loss, right = losses_of(model, prompt.ids)
    else:
        loss, right = steps.losses_of(prompt.ids, prompt.document, config)
    said = right_tokens(right, prompt.answers)
    layers = explain(model) if sparse or steps is not None else []
    document = loss[: prompt.document - 1]
    return NeedlesCounts(
        prompts=1,
        answers=len(said),
        exact=sum(map(all, said)),
        digits=sum(sum(answer.digits) for answer in prompt.answers),
        right=sum(
            count * good
            for answer, verdict in zip(prompt.answers, said, strict=True)
            for count, good in zip(answer.digits, verdict, strict=True)
        ),
        nll=sum(float(loss[at - 1]) for answer in prompt.answers for at in answer.positions),
        tokens=len(document),
        document_nll=float(document.sum()),
        read=[density(layers)],
        paths=[path_of(layers)],
    )


@dataclass(frozen=True)
class NeedlesPlan:
    """What to ask: `prompts` documents of each kind and length, with `facts` facts each, the same
    whatever the settings. `decode`: documents are read densely, and what comes after them by decode
    steps."""

    configs: dict[str, HiPConfig]
    lengths: Sequence[int]
    prompts: int = 8
    facts: int = 8
    seed: int = 0
    decode: bool = False

    @property
    def dense(self) -> str | None:
        """The name of the setting that the others are compared with: dense attention, if it is
        among them."""
        names = (name for name, config in self.configs.items() if config.method == "dense")
        return next(names, None)

    def window(self, text: list[int], length: int, number: int, rng: random.Random) -> list[int]:
        """The tokens of a prompt's document: a random part of its own share of the text; where a
        share is too short, windows overlap and are evenly spread."""
        share = len(text) // self.prompts
        if share >= length:
            start = number * share + rng.randrange(share - length + 1)
        else:
            start = (len(text) - length) * number // max(self.prompts - 1, 1)
        return text[start : start + length]

    def prompt(self, tokenizer: Any, text: list[int], length: int, number: int) -> NeedlesPrompt:
        """One of the prompts. Raises ValueError for a length that does not fit the text or the
        questions."""
        if length > len(text):
            allowed = f"at most the {len(text)} tokens of the document"
            raise ValueError(f"length: got {length}, allowed: {allowed}")
        rng = random.Random(f"{self.seed} {length} {number}")
        own = self.window(text, length, number, rng)
        return make_needles(tokenizer, own, length, self.facts, rng)


def against(row: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Any]:
    """What a row is beside that of dense attention: None without one."""
    apart = {f"{name}_minus_dense": dense and row[name] - dense[name] for name in ("digits", "nll")}
    return {**apart, "perplexity_over_dense": dense and row["perplexity"] / dense["perplexity"]}


def flops_columns(config: HiPConfig, length: int, path: str) -> dict[str, Any]:
    """What a prompt costs a sparse layer in FLOPs: selection over attention, and both over dense
    attention. None where no layer is sparse by its `path`, or a method does not tell."""
    cost = prompt_cost(config, length) if "sparse" in path else None
    selection = cost and cost.selection / cost.attention
    return {"selection_over_attention": selection, "flops_over_dense": cost and cost.share}


def needles_rows(
    model: Any, tokenizer: Any, texts: dict[str, list[int]], plan: NeedlesPlan, kept: Resumable
) -> Rows:
    """The rows of the report, of what `kept` has not yet: for each length and document (`texts`
    `{name: token ids}`) one for each of the settings. Prompt goes by prompt, with all settings one
    after the other, so that they meet the same machine. Raises ValueError if a length does not fit
    a text, or the model's logits are not known to be computed rightly."""
    check_logits(model, next(iter(texts.values())))
    kept.expect("prompts", len(plan.configs) * len(plan.lengths) * plan.prompts * len(texts))
    rows, steps = [], StepLosses(model) if plan.decode else None
    for length, (document, text) in product(plan.lengths, texts.items()):
        found = {name: NeedlesCounts() for name in plan.configs}
        for number in range(plan.prompts):
            prompt = plan.prompt(tokenizer, text, length, number)
            for name, config in plan.configs.items():
                key = ("needles", config.to_dict(), length, document, number)
                counted = kept.get(key, partial(read_needles, model, prompt, config, steps))
                found[name] += NeedlesCounts(**counted)
        own = {name: cell.row(name, length, document) for name, cell in found.items()}
        dense = None if plan.dense is None else own[plan.dense]
        for name, row in own.items():
            cost = {} if plan.decode else flops_columns(plan.configs[name], length, row["path"])
            rows.append(row | against(row, dense) | cost)
    return rows


def standard_library() -> str:
    """The source text of the standard library's modules that are single files, in the order of
    their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    known = [file for file in files if file.stem in sys.stdlib_module_names]
    return "\n".join(file.read_text(encoding="utf-8") for file in known)


def read_documents(kinds: str) -> dict[str, str]:
    """The texts of a comma list of `novel`, `code` and text files: `{name: text}`. Raises
    ValueError if one is neither, cannot be read or has the name of another."""
    texts: dict[str, str] = {}
    for kind in (part.strip() for part in kinds.split(",")):
        name = kind if kind in (NOVEL, CODE) else Path(kind).name
        if name in texts:
            raise ValueError(f"--documents: got {name!r} twice, allowed: each name once")
        try:
            file = DOCUMENT if kind == NOVEL else Path(kind)
            texts[name] = standard_library() if kind == CODE else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            allowed = f"{NOVEL}, {CODE} or a text file"
            raise ValueError(f"--documents: got {kind!r} ({error}), allowed: {allowed}") from None
    return texts
