"""How well estimates of need find the rows that need the middle most, on a real model: what `hip` samples against what was tried.

    python benchmarks/need_estimates.py runs/smollm2 [--length 8192] [--documents novel,code] [--prompts 2] [--output FILE]

One forward pass for each of the prompts of `hip-hf needles`, every layer and row sparse, in which those rows vote that truly need
the middle most (by all of its keys). Beside them each estimate chooses as many rows of every query block behind the first quarter
of the prompt. `need`: the true need of the rows that it chose, of all blocks together, over that of the right ones. `answers`:
the same in the blocks of questions and answers. `sharpest`: there, of the largest share of attention that a row gives to a single
key of the middle: what looks a fact up. `keys`: what an estimate costs, in keys multiplied with each row (a summary of two
vectors counts as two).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hip_hf.config import HiPConfig
from hip_hf.eval.documents import load
from hip_hf.eval.losses import hidden_of
from hip_hf.eval.needles import Plan, read_documents
from hip_hf.eval.passkey import use
from hip_hf.eval.presets import over_budgets
from hip_hf.eval.report import machine
from hip_hf.methods.base import QueryBlock
from hip_hf.methods.hip import TreeSearch
from hip_hf.methods.need import SPREAD, keep_needier_of_pairs, votes_of
from hip_hf.methods.pyramid import make_representative

# Of a prompt, the first part that is not looked at: its middles are short.
SKIPPED = 0.25
# Log-sum-exp `[heads, R]` of queries `[heads, R, D]` over the keys of a middle `[heads, n, D]`, estimated; and its cost in keys.
Estimate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, int]]


def lse(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (q @ keys.transpose(1, 2)).logsumexp(-1)


def chunked(keys: torch.Tensor, size: int) -> torch.Tensor:
    """`[heads, n, D]` -> `[heads, n / size, size, D]`."""
    return keys[:, : keys.shape[1] // size * size].unflatten(1, (-1, size))


def random_keys(keys: torch.Tensor, size: int) -> torch.Tensor:
    """A key of each chunk, at a place of its own."""
    chunks = chunked(keys, size)
    chunk = torch.arange(chunks.shape[1])
    return chunks[:, chunk, (chunk * SPREAD & 0xFFFFFFFF) * size >> 32]


def outliers(keys: torch.Tensor, size: int) -> torch.Tensor:
    """The key of each chunk that is farthest from the chunk's mean."""
    chunks = chunked(keys, size)
    at = (chunks - chunks.mean(2, keepdim=True)).norm(dim=-1).argmax(-1)
    return chunks.gather(2, at[..., None, None].expand(*at.shape, 1, keys.shape[2]))[:, :, 0]


def sampled(size: int) -> Estimate:
    """What `hip` does: at 8,192 tokens a key of each 16."""
    return lambda q, keys: (lse(q, random_keys(keys, size)), keys.shape[1] // size)


def outlying(size: int) -> Estimate:
    return lambda q, keys: (lse(q, outliers(keys, size)), keys.shape[1] // size)


def both(size: int) -> Estimate:
    """A key at random and the outlier of each chunk."""
    return lambda q, keys: (lse(q, torch.cat([random_keys(keys, size), outliers(keys, size)], 1)), 2 * (keys.shape[1] // size))


def means(size: int) -> Estimate:
    return lambda q, keys: (lse(q, chunked(keys, size).mean(2)), keys.shape[1] // size)


def gaussian(size: int) -> Estimate:
    """Mean and variance of each chunk: its log-mean-exp, were its keys normally distributed."""

    def estimate(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, int]:
        chunks = chunked(keys, size)
        moments = torch.cat([chunks.mean(2), chunks.var(2, unbiased=False) / 2], -1)
        return lse(torch.cat([q, q * q], -1), moments), 2 * moments.shape[1]

    return estimate


def centre_spread(size: int) -> Estimate:
    """The summaries that the tree is searched by."""
    blend = make_representative("blend", HiPConfig().method_options().weight)

    def estimate(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, int]:
        summaries = blend.row(blend.leaf(chunked(keys, size)))
        return lse(blend.features(q), summaries), 2 * summaries.shape[1]

    return estimate


def mean_of(one: Estimate, other: Estimate, weights: tuple[float, float]) -> Estimate:
    """The mean of two logarithms, each with that of how many keys one of its chunks stands for."""

    def estimate(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, int]:
        (a, cost), (b, more) = one(q, keys), other(q, keys)
        return (a + math.log(weights[0]) + b + math.log(weights[1])) / 2, cost + more

    return estimate


ESTIMATES: dict[str, Estimate] = {
    "a key at random and the outlier of each 32": both(32),
    "a key at random and the outlier of each 64": both(64),
    "a key at random of each 16": sampled(16),
    "a key at random of each 8": sampled(8),
    "a key at random of each 32": sampled(32),
    "the outlier of each 16": outlying(16),
    "the outlier of each 32": outlying(32),
    "means of 16": means(16),
    "mean and variance of 32": gaussian(32),
    "centre-spread of 32": centre_spread(32),
    "mean of centre-spread of 64 and a key at random of each 32": mean_of(centre_spread(64), sampled(32), (64, 32)),
    "mean of mean and variance of 64 and a key at random of each 32": mean_of(gaussian(64), sampled(32), (64, 32)),
    "sink and window alone": lambda q, keys: (q.new_zeros(q.shape[:2]), 0),
}


class Witness:
    """Stands in for `TreeSearch._log_mass` and `_votes`: compares what estimates choose with what is right, which votes."""

    def __init__(self, tokens: int, document: int) -> None:
        self.first, self.document = int(SKIPPED * tokens), document
        self.found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.waiting: list[tuple[int, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []
        self.votes = TreeSearch._votes

    def log_mass(self, search: TreeSearch, heads: slice, blocks: list[QueryBlock], q: torch.Tensor, level: Any) -> torch.Tensor:
        out, size = q.new_empty(q.shape[:3]), search.config.block_k
        for i in range(q.shape[1]):
            block = blocks[i % len(blocks)]
            keys = search.keys[heads][:, block.low * size : block.high * size]
            logits = q[:, i] @ keys.transpose(1, 2)
            out[:, i] = logits.logsumexp(-1)
            if block.first < self.first:
                continue
            estimates = {}
            for name, estimate in ESTIMATES.items():
                estimates[name], cost = estimate(q[:, i], keys)
                self.found[name]["cost"] += cost
                self.found[name]["blocks"] += 1
            self.waiting.append((i, out[:, i], logits.amax(-1), estimates))
        return out

    def compare(self, search: TreeSearch, heads: slice, blocks: list[QueryBlock], near: torch.Tensor, level: Any) -> Any:
        result = self.votes(search, heads, blocks, near, level)
        rows = blocks[0].rows
        near = search._grouped(near.unflatten(2, (-1, rows, 1)))[..., 0]
        for i, true, highest, estimates in self.waiting:
            voters = true.shape[1] // rows
            need = torch.sigmoid(true - near[:, i])
            sharp = torch.exp(highest - torch.logaddexp(true, near[:, i]))

            def chosen(lse: torch.Tensor, near: torch.Tensor = near[:, i], voters: int = voters) -> torch.Tensor:
                count, ranks = votes_of(search.config, rows, voters), lse - near
                keep_needier_of_pairs(ranks, voters, count)
                return ranks.topk(count, dim=-1).indices

            right, ends = chosen(true), blocks[i % len(blocks)].last >= self.document
            for name, estimate in estimates.items():
                row, by = self.found[name], chosen(estimate)
                for what, x, counts in (("need", need, True), ("answers", need, ends), ("sharpest", sharp, ends)):
                    row[what] += counts * float(x.gather(-1, by).sum())
                    row[f"{what}, right"] += counts * float(x.gather(-1, right).sum())
        self.waiting.clear()
        return result

    def __enter__(self) -> Witness:
        self.patches = mock.patch.multiple(
            TreeSearch, _log_mass=lambda *args: self.log_mass(*args), _votes=lambda *args: self.compare(*args)
        )
        self.patches.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.patches.stop()


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, plan: Plan, documents: dict[str, str], config: HiPConfig) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the witness is told of one search after the other
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for text in documents.values():
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        for number in range(plan.prompts):
            prompt = plan.prompt(tokenizer, ids, plan.lengths[0], number)
            use(model, config)
            with Witness(len(prompt.ids), prompt.document) as witness:
                hidden_of(model, prompt.ids)
            for name, row in witness.found.items():
                for what, value in row.items():
                    sums[name][what] += value
    torch.set_num_threads(threads)
    shares = ("need", "answers", "sharpest")
    return [
        {
            "estimate": name,
            "keys": round(row["cost"] / row["blocks"]),
            **{what: row[what] / row[f"{what}, right"] for what in shares},
        }
        for name, row in sums.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--documents", default="novel,code")
    parser.add_argument("--prompts", type=int, default=2, help="of each document")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    (config,) = over_budgets(["defaults"], [given.budget], tokens=given.length, checkpoint=given.model).values()
    model, tokenizer = load(given.model, "hip")
    plan = Plan({}, [given.length], given.prompts)
    rows = measure(model, tokenizer, plan, read_documents(given.documents), config)
    print("| estimate | keys | need | answers | sharpest |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['estimate']} | {row['keys']} | {row['need']:.3f} | {row['answers']:.3f} | {row['sharpest']:.3f} |")
    if given.output:
        request = {"command": "need_estimates", **vars(given), "output": None, "config": config.to_dict()}
        given.output.write_text(json.dumps({**request, "rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
