"""How much of dense attention a selection captures, layer by layer, beside the block oracle and its
cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.capture import capture
from hip_hf.eval.measure.costs import AttentionCost, total_cost
from hip_hf.eval.measure.documents import encode, make_prompt, note_sentence, question
from hip_hf.eval.measure.hyper_assumptions import measure_assumptions
from hip_hf.eval.measure.mass import measure_mass, unsearched
from hip_hf.eval.measure.passkey import draw_facts
from hip_hf.eval.reporting.resumable import Resumable, Rows
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem


def layer_row(settings: str, layer: int | str, keys: int, parts: Sequence[Any]) -> dict[str, Any]:
    """One row of the report, from what was measured of one layer on several prompts, as it is
    kept (`MeasuredMass`)."""
    mass, oracle, weight = (
        torch.cat([torch.tensor(part[name], dtype=torch.float64) for part in parts], dim=-1)
        for name in ("mass", "oracle", "rows")
    )
    weight /= weight.sum()
    of_head, best = mass @ weight, (oracle @ weight).mean()
    of_oracle = float(of_head.mean() / best)
    error, norm = (sum(part[name] for part in parts) for name in ("error", "norm"))
    cost = total_cost(AttentionCost(**part["cost"]) for part in parts)
    return {
        "settings": settings,
        "keys": keys,
        "layer": layer,
        "mass": float(of_head.mean()),
        "oracle": float(best),
        "of_oracle": of_oracle,
        "worst_layer": of_oracle,
        "low_5pct": float(mass.flatten().quantile(0.05)),
        "worst_head": float(of_head.min()),
        "error": (error / norm) ** 0.5,
        "overlap": mean([part["overlap"] for part in parts]),
        "read": cost.read / cost.visible,
        "keys_read": cost.read / cost.rows,
        "selection_flops": cost.selection / cost.rows,
        "attention_flops": cost.attention / cost.rows,
        "cost": cost.share,
        "bytes": (cost.selection_bytes + cost.attention_bytes) / cost.rows,
        "bytes_share": cost.bytes_share,
    }


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if there is a value missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def over_layers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of all layers: means (of the share of the oracle: a ratio of means), but the lowest
    of what is already a lowest."""
    row: dict[str, Any] = {
        name: value if isinstance(value, str) else mean([r[name] for r in rows])
        for name, value in rows[0].items()
    }
    row |= {name: min(r[name] for r in rows) for name in ("worst_layer", "low_5pct", "worst_head")}
    return row | {"of_oracle": row["mass"] / row["oracle"], "keys": rows[0]["keys"], "layer": "all"}


def make_text(tokenizer: Any, body: list[int], facts: int, rng: random.Random) -> list[int]:
    """A text as long as `body` (token ids), of which it is made, with `facts` facts hidden in it;
    each is asked for later on. Raises ValueError if `body` is too short for them."""
    last, *others = hidden = draw_facts(rng, [rng.random() for _ in range(facts)])
    asked = []
    for fact in others:
        answered = encode(tokenizer, f"{question(fact.name)} {fact.key}.\n")
        asked.append((rng.uniform(fact.depth, 1), answered))
    added = sum(len(encode(tokenizer, note_sentence(fact.name, fact.key))) for fact in hidden)
    added += sum(len(ids) for _, ids in asked) + len(encode(tokenizer, question(last.name)))
    if added > len(body):
        raise ValueError(f"--facts: got {facts}, allowed: fewer in {len(body)} tokens")
    text = body[: len(body) - added]
    # from the end, so that earlier places stay where they are
    for depth, ids in sorted(asked, reverse=True):
        at = round(depth * (len(body) - added))
        text[at:at] = ids
    return make_prompt(tokenizer, text, len(body), hidden, last.name)


def end_to_end(segments: Sequence[AttentionProblem], rows: int) -> AttentionProblem:
    """The last `rows` query rows of the last segment against the keys of all segments, one after
    the other.

    Every segment keeps its own positions, so all of them look near to these rows: far stronger
    distractors than a long text would hold.
    """
    k = torch.cat([segment.k for segment in segments], dim=2)
    v = torch.cat([segment.v for segment in segments], dim=2)
    last, spans = segments[-1], (Span(0, 0, k.shape[2], 0, rows, k.shape[2] - rows),)
    return replace(last, q=last.q[:, :, -rows:], k=k, v=v, spans=spans)


@dataclass(frozen=True)
class FidelityPlan:
    """What to measure on: `prompts` texts of `tokens` tokens; with `stress` segments of such texts
    end to end, to each of the `lengths`, and only the last `rows` query rows."""

    configs: dict[str, HiPConfig]
    tokens: int
    prompts: int = 2
    facts: int = 8
    lengths: Sequence[int] = ()
    rows: int | None = None
    seed: int = 0

    @property
    def segments(self) -> int:
        """Texts in each prompt."""
        return max(self.lengths, default=self.tokens) // self.tokens

    def text(self, tokenizer: Any, ids: list[int], number: int) -> list[int]:
        """One of the `prompts * segments` texts, which are evenly spread over the document."""
        start = (len(ids) - self.tokens) * number // max(self.prompts * self.segments - 1, 1)
        rng = random.Random(f"{self.seed} {number}")
        return make_text(tokenizer, ids[start : start + self.tokens], self.facts, rng)


@dataclass
class FidelityFound:
    """What was measured, by (keys, settings, layer); what `hyper` assumes of each layer; which
    layers were left out, and why."""

    parts: dict[tuple[int, str, int], Rows] = field(default_factory=dict)
    assumptions: dict[int, Rows] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def rows(self, lengths: Sequence[int], names: Sequence[str]) -> tuple[Rows, Rows]:
        """The rows of the report, and those of all layers together alone."""
        table, layered = [], []
        for cell in product(lengths, names):
            keys = [key for key in self.parts if key[:2] == cell]
            if own := [layer_row(*key[1:], key[0], self.parts[key]) for key in keys]:
                table.append(over_layers(own))
                layered += [table[-1], *own]
        return layered, table


def problems_of(
    read: Callable[[int], list[AttentionProblem]], plan: FidelityPlan, prompt: int
) -> Iterator[tuple[int, int, AttentionProblem]]:
    """Keys, layer and problem of everything to measure on one prompt; in the stress test at every
    length."""
    rows = plan.rows
    if rows is None:
        for layer, problem in enumerate(read(prompt)):
            yield plan.tokens, layer, problem
        return
    # keep only what is needed of each: the queries of the last rows, and keys and values
    segments = [
        [replace(p, q=p.q[:, :, -rows:].clone(), v=p.v.contiguous()) for p in read(number)]
        for number in range(prompt * plan.segments, (prompt + 1) * plan.segments)
    ]
    for length in plan.lengths:
        for layer, parts in enumerate(zip(*segments[-(length // plan.tokens) :], strict=True)):
            yield length, layer, end_to_end(parts, rows)


def measure_prompt(
    read: Callable[[int], list[AttentionProblem]], plan: FidelityPlan, prompt: int
) -> dict[str, Any]:
    """Everything of one prompt."""
    parts, assumptions, skipped, configs = [], [], {}, list(plan.configs.values())
    hyper = [config for config in configs if config.method == "hyper"]
    for keys, layer, problem in problems_of(read, plan, prompt):
        if reason := unsearched(problem, configs, layer):
            skipped[layer] = reason
            continue
        found = zip(plan.configs, measure_mass(problem, configs, layer), strict=True)
        parts += [[keys, name, layer, part] for name, part in found]
        if hyper and plan.rows is None:
            assumptions.append([layer, measure_assumptions(problem, hyper[0])])
    return {"parts": parts, "assumptions": assumptions, "skipped": list(skipped.items())}


def measure_all(
    model: Any, tokenizer: Any, ids: list[int], plan: FidelityPlan, kept: Resumable
) -> FidelityFound:
    """What is in `kept`, and what is not yet. Raises ValueError if there are too many facts for the
    texts, or nothing to search."""

    def read(number: int) -> list[AttentionProblem]:
        text = plan.text(tokenizer, ids, number)
        return capture(model, torch.tensor([text], device=model.device))

    all_found = FidelityFound()
    kept.expect("texts", plan.prompts)
    for prompt in range(plan.prompts):
        saved = kept.get(("fidelity", prompt), partial(measure_prompt, read, plan, prompt))
        for keys, name, layer, part in saved["parts"]:
            all_found.parts.setdefault((keys, name, layer), []).append(part)
        for layer, values in saved["assumptions"]:
            all_found.assumptions.setdefault(layer, []).append(values)
        all_found.skipped |= dict(saved["skipped"])
    if not all_found.parts:
        reason = next(iter(all_found.skipped.values()))
        raise ValueError(f"nothing to measure in any layer: {reason}")
    return all_found
