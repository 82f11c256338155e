"""What selections keep of that which a real model's answers look up: settings of the search, and
estimates of need (with `beam=8`, so that a part of the rows votes), side by side.

    python benchmarks/lookups.py runs/smollm2 [--length 8192] [--documents novel,code] [--prompts 4]
        [--budget 256] [--output FILE]

One dense forward pass for each of the prompts of `hip-hf needles`; then every layer selects for the
rows of questions and answers by each of the settings, from the same queries and keys. That is some
twenty times cheaper than `hip-hf needles`, and free of what one layer's errors do to the next: good
for comparing, while only needles tell what answers are left. Of the rows that say a digit of an
answer, over all layers and heads:

`facts`: of the attention that they give to that fact's digits in the document, the share that is
read. `lost`: the share of the digits of which less than 0.7 is read. `missed`: the share of all
their attention that is not read. Of all rows of questions and answers, names as well: `links`, the
share that is read of all attention of a tenth and more to a single key between sink and window.
`cost`: the FLOPs of selection over those of attention, for a whole prompt.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from hip_hf.attention import attend
from hip_hf.backends.torch import sparse
from hip_hf.cli.presets import over_budgets
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.capture import capture
from hip_hf.eval.measure.costs import prompt_cost
from hip_hf.eval.measure.documents import load
from hip_hf.eval.measure.mass import chosen, probabilities, searched_blocks
from hip_hf.eval.measure.needles import NeedlesPlan, NeedlesPrompt, read_documents
from hip_hf.eval.reporting.report import machine
from hip_hf.geometry import BlockMask, QueryBlock, Span, make_query_block
from hip_hf.methods import hip, need
from hip_hf.methods.base import options_of
from hip_hf.methods.need import SPREAD
from hip_hf.methods.pyramid import make_representative
from hip_hf.problem import AttentionProblem

SETTINGS = (
    "{}", '{"options": {"onward": 0}}', '{"options": {"onward": 0.15}}',
    '{"options": {"onward": 0.5}}', '{"options": {"descent": 1}}', '{"options": {"descent": 4}}',
    '{"query_stride": 4}', '{"query_stride": 16}', '{"beam": 8}', '{"rescore": 8}',
    '{"rescore": 8, "beam": 8}', '{"rescore": 1}', '{"representative": "middle"}',
    '{"representative": "minmax"}', '{"score": "max"}', '{"group_shared": false}',
    '{"block_q": 128}', '{"block_q": 32}', '{"options": {"sample": 512}}',
    '{"options": {"sample": 256}}', "true_need", '{"vote": "sampled"}', "paper",
    '{"method": "staged"}', '{"method": "quest"}', '{"method": "vertical_slash"}',
    '{"method": "sample"}', '{"method": "streaming"}', '{"method": "oracle"}',
)  # fmt: skip
# Settings under which the estimates are compared. By the defaults a context of 8,192 tokens is
# looked at whole, all rows that are asked vote, and nothing is estimated.
ESTIMATING = '{"beam": 8}'
# A digit of whose lookups less is read counts as lost.
ENOUGH = 0.7
# So much attention to a single key is a lookup.
LOOKUP = 0.1
# Query blocks begin at multiples of this many rows, whatever their size.
ALIGNED = 256
MEASURES = ("facts", "lost", "missed", "links")
# What queries `[heads, R, D]` would find among the candidate keys `[heads, n, D]` between sink and
# window: `[heads, R]`, a logarithm.
Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def highest(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (q @ keys.transpose(1, 2)).amax(-1)


def mass(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (q @ keys.transpose(1, 2)).logsumexp(-1)


def chunked(keys: torch.Tensor, size: int) -> torch.Tensor:
    """`[heads, n, D]` -> `[heads, n / size, size, D]`."""
    return keys[:, : keys.shape[1] // size * size].unflatten(1, (-1, size))


def at_random(keys: torch.Tensor, size: int) -> torch.Tensor:
    """A key of each chunk, at a place of its own."""
    chunks = chunked(keys, size)
    chunk = torch.arange(chunks.shape[1])
    return chunks[:, chunk, (chunk * SPREAD & 0xFFFFFFFF) * size >> 32]


def outliers(keys: torch.Tensor, size: int) -> torch.Tensor:
    """The key of each chunk that is farthest from the chunk's mean."""
    chunks = chunked(keys, size)
    at = (chunks - chunks.mean(2, keepdim=True)).norm(dim=-1).argmax(-1)
    return chunks.gather(2, at[..., None, None].expand(*at.shape, 1, keys.shape[2]))[:, :, 0]


def slow(x: torch.Tensor) -> torch.Tensor:
    """Of a head's numbers the half that RoPE turns slowest."""
    pairs = torch.arange(x.shape[-1] // 4, x.shape[-1] // 2)
    return x[..., torch.cat([pairs, pairs + x.shape[-1] // 2])]


def gaussian(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """By mean and variance of each chunk of 32: its log-mean-exp, were its keys normally
    distributed."""
    chunks = chunked(keys, 32)
    return mass(
        torch.cat([q, q * q], -1),
        torch.cat([chunks.mean(2), chunks.var(2, unbiased=False) / 2], -1),
    )


def centre_spread(size: int) -> Estimate:
    """Estimate by the summaries of chunks of `size` keys with which the tree is searched, each
    counted as `size` keys."""

    def estimate(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        blend = make_representative("blend", options_of(HiPConfig(), need.Options).weight)
        return mass(blend.features(q), blend.row(blend.leaf(chunked(keys, size)))) + math.log(size)

    return estimate


def both(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The mean of two: summaries of chunks of 64, by which the candidates hold too much, and a key
    of each 32, each counted as 32."""
    return (centre_spread(64)(q, keys) + mass(q, at_random(keys, 32)) + math.log(32)) / 2


# Each with the step from one row that is asked to the next, and with what it multiplies with a row
# on average, in keys, of the 7,500 between sink and window of 8,192.
ESTIMATES: dict[str, tuple[Estimate, int, int]] = {
    "the highest of a key of each 8, every second row": (
        lambda q, k: highest(q, at_random(k, 8)), 2, 466),
    "the highest of a key of each 16, every second row": (
        lambda q, k: highest(q, at_random(k, 16)), 2, 233),
    "the highest of a key of each 16, every row": (
        lambda q, k: highest(q, at_random(k, 16)), 1, 466),
    "the highest of a key of each 8, every row": (lambda q, k: highest(q, at_random(k, 8)), 1, 932),
    "log-sum-exp of a key of each 16, every row": (lambda q, k: mass(q, at_random(k, 16)), 1, 466),
    "log-sum-exp of a key of each 8, every second row": (
        lambda q, k: mass(q, at_random(k, 8)), 2, 466),
    "the highest of a key of each 8, its slow half, every row": (
        lambda q, k: highest(slow(q), slow(at_random(k, 8))), 1, 466),
    "the highest of a key and the outlier of each 32, every row": (
        lambda q, k: highest(q, torch.cat([at_random(k, 32), outliers(k, 32)], 1)), 1, 466),
    "log-sum-exp of means of 16, every row": (lambda q, k: mass(q, chunked(k, 16).mean(2)), 1, 466),
    "mean and variance of 32, every row": (gaussian, 1, 466),
    "centre and spread of 32, every row": (centre_spread(32), 1, 466),
    "mean of centre and spread of 64 and log-sum-exp of a key of each 32, every row": (
        both, 1, 466),
    "sink and window alone, every row": (lambda q, k: q.new_zeros(q.shape[:2]), 1, 0),
    "the highest of all keys, every second row": (highest, 2, 3730),
    "the highest of all keys, every row": (highest, 1, 7460),
    "log-sum-exp of all keys, every row": (mass, 1, 7460),
}  # fmt: skip


@dataclass
class Kept:
    """Sums over layers and heads: attention to a fact's digits, `[digits]`, `all` and what is
    `read`; what is `missed` of all attention of `rows` rows; all attention that looks up a key
    between sink and window, and what is read of that."""

    all: torch.Tensor
    read: torch.Tensor
    missed: float = 0.0
    rows: int = 0
    links: float = 0.0
    links_read: float = 0.0

    def measure(self) -> dict[str, float]:
        return {
            "facts": float(self.read.sum() / self.all.sum()),
            "lost": float((self.read < ENOUGH * self.all).double().mean()),
            "missed": self.missed / self.rows,
            "links": self.links_read / self.links,
        }


def marks_of(prompt: NeedlesPrompt) -> list[tuple[int, list[int]]]:
    """For each digit token of an answer: the row that says it, and where its fact's digits stand in
    the document."""
    marks = []
    for answer in prompt.answers:
        key = [prompt.ids[at] for at in answer.positions]
        starts = [
            at for at in range(prompt.document - len(key)) if prompt.ids[at : at + len(key)] == key
        ]
        marks += [
            (at - 1, [start + i for start in starts for i in range(len(key))])
            for at in answer.positions
        ]
    return marks


def last_rows(problem: AttentionProblem, start: int) -> AttentionProblem:
    """The problem of the rows from `start` on."""
    keys = problem.k.shape[2]
    return replace(
        problem, q=problem.q[:, :, start:], spans=(Span(0, 0, keys, 0, keys - start, start),)
    )


def seen_by(
    problem: AttentionProblem, mask: BlockMask, head: int, at: int, block: QueryBlock
) -> torch.Tensor:
    """Which keys, from the first to the block's last, a query block reads, for the query heads of a
    key head: `[G, keys]`."""
    ids = chosen(problem, mask, head, at)
    seen = torch.zeros(problem.groups, block.last + 1, dtype=torch.bool)
    keys = (ids[..., None] * mask.block_k + torch.arange(mask.block_k)).flatten(1)
    seen.scatter_(1, keys, True)
    seen[:, : block.sink_end], seen[:, block.window_start :] = True, True
    return seen


def attention_of(
    problem: AttentionProblem, config: HiPConfig, start: int, marks: list[tuple[int, list[int]]]
) -> list[torch.Tensor]:
    """Dense attention of each digit's row: `[Hkv, G, keys up to it]`."""
    heads = range(problem.k.shape[1])
    rows = [make_query_block(config, row - start, row, row, None, None) for row, _ in marks]
    return [
        torch.stack([probabilities(problem, head, row)[:, 0] for head in heads]) for row in rows
    ]


def links_of(
    problem: AttentionProblem, config: HiPConfig, start: int, first: int
) -> tuple[torch.Tensor, ...]:
    """All dense attention of `LOOKUP` and more to a key by the rows from `first` on: key head,
    query head of the group, row, key, and how much, a number for each."""
    heads, parts = range(problem.k.shape[1]), []
    for row in range(first, problem.k.shape[2], ALIGNED):
        last = min(row + ALIGNED, problem.k.shape[2]) - 1
        block = make_query_block(config, row - start, row, last, None, None)
        found = torch.stack([probabilities(problem, head, block) for head in heads])
        head, group, at, key = (found >= LOOKUP).nonzero(as_tuple=True)
        parts.append((head, group, at + row, key, found[head, group, at, key]))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def add(
    kept: Kept,
    problem: AttentionProblem,
    config: HiPConfig,
    marks: list[tuple[int, list[int]]],
    attention: list[torch.Tensor],
    links: tuple[torch.Tensor, ...],
) -> None:
    """Add a layer."""
    result = attend(problem, config, need_mask=True)
    if result.path != "sparse":
        raise ValueError(
            f"settings: got {config} ({result.reason}), "
            "allowed: settings by which this prompt is sparse"
        )
    assert result.mask is not None
    heads, (head, group, row, key, much) = range(problem.k.shape[1]), links
    for at, block in searched_blocks(problem, config):
        seen = torch.stack([seen_by(problem, result.mask, each, at, block) for each in heads])
        mine = (
            (row >= block.first)
            & (row <= block.last)
            & (key >= block.sink_end)
            & (key < block.window_start)
        )
        kept.links += float(much[mine].sum())
        kept.links_read += float((much[mine] * seen[head[mine], group[mine], key[mine]]).sum())
        for digit, ((said_at, facts), own) in enumerate(zip(marks, attention, strict=True)):
            if block.first <= said_at <= block.last:
                read = own * seen[:, :, : said_at + 1]
                kept.all[digit] += own[:, :, facts].sum()
                kept.read[digit] += read[:, :, facts].sum()
                kept.missed += float((own - read).sum())
                kept.rows += own[..., 0].numel()


@contextmanager
def needed_by(estimate: Estimate, step: int) -> Iterator[None]:
    """Within it, votes are chosen by that estimate of their need, from every `step`-th row.

    Raises:
        ValueError: nothing was estimated.
    """
    estimated = []

    def stand_in(
        self: hip.TreeSearch, heads: slice, blocks: list[QueryBlock], q: torch.Tensor, level: int
    ) -> torch.Tensor:
        estimated.append(True)
        size, out = self.config.block_k, q.new_empty(q.shape[:3])
        for i in range(q.shape[1]):
            block = blocks[i % len(blocks)]
            out[:, i] = estimate(q[:, i], self.keys[heads][:, block.low * size : block.high * size])
        return out

    asked = lambda config, rows: range((rows - 1) % step, rows, step)  # noqa: E731
    with ExitStack() as stack:
        for module in (hip, need, sparse):
            stack.enter_context(mock.patch.object(module, "asked_rows", asked))
        stack.enter_context(mock.patch.object(hip.TreeSearch, "_highest", stand_in))
        yield
    if not estimated:
        raise ValueError(
            "nothing was estimated: the candidates are looked at whole, and all rows vote. "
            f"Allowed: a --length beyond that (with {ESTIMATING})"
        )


@torch.inference_mode()
def measure(
    model: Any, tokenizer: Any, plan: NeedlesPlan, documents: dict[str, str], config: HiPConfig
) -> dict[str, Any]:
    """Rows of the two tables."""
    (length,) = plan.lengths
    settings: dict[str, list[Kept]] = {name: [] for name in plan.configs}
    estimates: dict[str, list[Kept]] = {name: [] for name in ESTIMATES}
    bar = tqdm(total=len(documents) * plan.prompts, unit="prompt")
    for text in documents.values():
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        for number in range(plan.prompts):
            prompt = plan.prompt(tokenizer, ids, length, number)
            marks, start = marks_of(prompt), prompt.document // ALIGNED * ALIGNED
            problems = [
                last_rows(problem, start) for problem in capture(model, torch.tensor([prompt.ids]))
            ]
            for found in (settings, estimates):
                for kept in found.values():
                    nothing = torch.zeros(len(marks), dtype=torch.float64)
                    kept.append(Kept(nothing, nothing.clone()))
            for problem in problems:
                attention = attention_of(problem, config, start, marks)
                links = links_of(problem, config, start, prompt.document)
                for name, one in plan.configs.items():
                    add(settings[name][-1], problem, one, marks, attention, links)
                for name, (estimate, step, _) in ESTIMATES.items():
                    with needed_by(estimate, step):
                        add(estimates[name][-1], problem, config, marks, attention, links)
            bar.update()

    def mean(some: list[Kept]) -> dict[str, float]:
        return {name: sum(one.measure()[name] for one in some) / len(some) for name in MEASURES}

    costs: dict[str, Any] = {name: prompt_cost(one, length) for name, one in plan.configs.items()}
    return {
        "settings": [
            {"settings": name, **mean(some), "cost": costs[name].selection / costs[name].attention}
            for name, some in settings.items()
        ],
        "estimates": [
            {"estimate": name, "keys": ESTIMATES[name][2], **mean(some)}
            for name, some in estimates.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--documents", default="novel,code")
    parser.add_argument("--prompts", type=int, default=4, help="of each document")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument(
        "--settings", action="append", help="a preset or JSON; default: a list of them"
    )
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    configs = over_budgets(
        given.settings or SETTINGS, [given.budget], tokens=given.length, checkpoint=given.model
    )
    (config,) = over_budgets(
        [ESTIMATING], [given.budget], tokens=given.length, checkpoint=given.model
    ).values()
    model, tokenizer = load(given.model, "sdpa")
    plan = NeedlesPlan(configs, [given.length], given.prompts)
    tables = measure(model, tokenizer, plan, read_documents(given.documents), config)
    figures = lambda row: " | ".join(f"{row[name]:.3f}" for name in MEASURES)  # noqa: E731
    print(
        f"| settings | {' | '.join(MEASURES)} | selection / attention |\n|---|---|---|---|---|---|"
    )
    for row in tables["settings"]:
        print(f"| `{row['settings']}` | {figures(row)} | {row['cost']:.2f} |")
    print(f"\n| need by | keys a row | {' | '.join(MEASURES)} |\n|---|---|---|---|---|---|")
    for row in tables["estimates"]:
        print(f"| {row['estimate']} | {row['keys']} | {figures(row)} |")
    if given.output:
        named = {name: one.to_dict() for name, one in configs.items()}
        request = {"command": "lookups", **vars(given), "output": None, "configs": named}
        given.output.write_text(
            json.dumps({**request, **tables, "machine": machine()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
