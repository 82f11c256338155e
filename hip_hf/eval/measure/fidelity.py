"""How much of dense attention a selection captures, layer by layer, beside the block oracle and its
cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.capture import capture
from hip_hf.eval.measure.costs import AttentionCost, total
from hip_hf.eval.measure.documents import make_prompt, note, question
from hip_hf.eval.measure.hyper_assumptions import measure_assumptions
from hip_hf.eval.measure.mass import measure, unsearched
from hip_hf.eval.measure.passkey import draw_facts
from hip_hf.eval.reporting.resumable import Resumable
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
    of_oracle = float((mass @ weight).mean() / (oracle @ weight).mean())
    cost = total(AttentionCost(**part["cost"]) for part in parts)
    return {
        "settings": settings,
        "keys": keys,
        "layer": layer,
        "mass": float((mass @ weight).mean()),
        "oracle": float((oracle @ weight).mean()),
        "of_oracle": of_oracle,
        "worst_layer": of_oracle,
        "low_5pct": float(mass.flatten().quantile(0.05)),
        "worst_head": float((mass @ weight).min()),
        "error": (sum(part["error"] for part in parts) / sum(part["norm"] for part in parts))
        ** 0.5,
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
    """A text as long as `body` (token ids), of which it is made, with facts hidden in it; each is
    asked for later on. Raises ValueError if `body` is too short for so many facts."""
    encode = lambda string: tokenizer.encode(string, add_special_tokens=False)  # noqa: E731
    last, *others = hidden = draw_facts(rng, [rng.random() for _ in range(facts)])
    asked = [
        (rng.uniform(fact.depth, 1), encode(f"{question(fact.name)} {fact.key}.\n"))
        for fact in others
    ]
    added = sum(len(encode(note(fact.name, fact.key))) for fact in hidden)
    added += sum(len(ids) for _, ids in asked) + len(encode(question(last.name)))
    if added > len(body):
        raise ValueError(f"--facts: got {facts}, allowed: fewer in {len(body)} tokens")
    text = body[: len(body) - added]
    for depth, ids in sorted(
        asked, reverse=True
    ):  # from the end, so that earlier places stay where they are
        at = round(depth * (len(body) - added))
        text[at:at] = ids
    return make_prompt(tokenizer, text, len(body), hidden, last.name)


def end_to_end(segments: Sequence[AttentionProblem], rows: int) -> AttentionProblem:
    """The last `rows` query rows of the last segment against the keys of all segments, one after
    the other.

    Every segment keeps its own positions, so all of them look near to these rows: far stronger
    distractors than a long text would hold.
    """
    k, v = (
        torch.cat([getattr(segment, name) for segment in segments], dim=2) for name in ("k", "v")
    )
    last, keys = segments[-1], k.shape[2]
    return replace(
        last, q=last.q[:, :, -rows:], k=k, v=v, spans=(Span(0, 0, keys, 0, rows, keys - rows),)
    )


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
        return make_text(
            tokenizer,
            ids[start : start + self.tokens],
            self.facts,
            random.Random(f"{self.seed} {number}"),
        )


@dataclass
class FidelityFound:
    """What was measured, by (keys, settings, layer); what `hyper` assumes of each layer; which
    layers were left out, and why."""

    parts: dict[tuple[int, str, int], list[dict[str, Any]]] = field(default_factory=dict)
    assumptions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def rows(
        self, lengths: Sequence[int], names: Sequence[str]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of the report, and those of all layers together alone."""
        table, layered = [], []
        for keys in lengths:
            for name in names:
                own = [
                    layer_row(*key[1:], keys, found)
                    for key, found in self.parts.items()
                    if key[:2] == (keys, name)
                ]
                if own:
                    table.append(over_layers(own))
                    layered += [table[-1], *own]
        return layered, table


def problems_of(
    read: Callable[[int], list[AttentionProblem]], plan: FidelityPlan, prompt: int
) -> Iterator[tuple[int, int, AttentionProblem]]:
    """Keys, layer and problem of everything to measure on one prompt; in the stress test at every
    length."""
    if plan.rows is None:
        for layer, problem in enumerate(read(prompt)):
            yield plan.tokens, layer, problem
        return
    segments = []
    for number in range(prompt * plan.segments, (prompt + 1) * plan.segments):
        # keep only what is needed of each: the queries of the last rows, and keys and values
        segments.append(
            [
                replace(p, q=p.q[:, :, -plan.rows :].clone(), v=p.v.contiguous())
                for p in read(number)
            ]
        )
    for length in plan.lengths:
        for layer, parts in enumerate(zip(*segments[-(length // plan.tokens) :], strict=True)):
            yield length, layer, end_to_end(parts, plan.rows)


def measure_prompt(
    read: Callable[[int], list[AttentionProblem]], plan: FidelityPlan, prompt: int
) -> dict[str, Any]:
    """Everything of one prompt."""
    parts, assumptions, skipped = [], [], {}
    hyper = [config for config in plan.configs.values() if config.method == "hyper"]
    for keys, layer, problem in problems_of(read, plan, prompt):
        if reason := unsearched(problem, plan.configs.values(), layer):
            skipped[layer] = reason
            continue
        for name, part in zip(
            plan.configs, measure(problem, list(plan.configs.values()), layer), strict=True
        ):
            parts.append([keys, name, layer, part])
        if hyper and plan.rows is None:
            assumptions.append([layer, measure_assumptions(problem, hyper[0])])
    return {"parts": parts, "assumptions": assumptions, "skipped": list(skipped.items())}


def measure_all(
    model: Any, tokenizer: Any, ids: list[int], plan: FidelityPlan, kept: Resumable
) -> FidelityFound:
    """What is in `kept`, and what is not yet. Raises ValueError if there are too many facts for the
    texts, or nothing to search."""

    def read(number: int) -> list[AttentionProblem]:
        return capture(
            model, torch.tensor([plan.text(tokenizer, ids, number)], device=model.device)
        )

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
        raise ValueError(
            f"nothing to measure in any layer: {next(iter(all_found.skipped.values()))}"
        )
    return all_found
