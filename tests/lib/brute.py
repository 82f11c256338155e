"""Who votes in the tree search of `hip_hf/methods/naive.py`, and the block oracle: written down
from the description, in float64.

Slow and plain on purpose: the tests compare block sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hip_hf.methods.naive import Search, Vote, log_sum_exp


def sampled(rows: torch.Tensor, stride: int) -> list[Vote]:
    """Votes of every `stride`-th of a query block's rows `[rows, heads, D]`, counted back from the
    last; all heads of each."""
    return [(row, None) for last in range(len(rows) - 1, -1, -stride) for row in rows[last]]


def always_read(
    config: Any, keys: torch.Tensor, rows: torch.Tensor, first: int, low: int, high: int,
    logit: Callable[..., float], sinks: list[float] | None = None, sliding: int | None = None,
) -> dict[tuple[int, int], float]:  # fmt: skip
    """Log-sum-exp of each row of a query block `[rows, heads, D]`, which begins at position
    `first`, over what it reads in any case: all but the candidates `[low, high)`. `logit(row, key)`
    scales and caps; `sinks`: an extra logit for each head."""
    bk, (count, heads, _), near = config.block_k, rows.shape, {}
    for row, head in ((row, head) for row in range(count) for head in range(heads)):
        seen = [*range(low * bk), *range(high * bk, first + row + 1)]
        seen = [at for at in seen if sliding is None or at > first + row - sliding]
        near[row, head] = log_sum_exp(
            [logit(rows[row, head], keys[at]) for at in seen] + ([sinks[head]] if sinks else [])
        )
    return near


def by_need(
    config: Any, keys: torch.Tensor, rows: torch.Tensor, first: int, low: int, high: int,
    logit: Callable[..., float], sinks: list[float] | None = None, sliding: int | None = None,
    most: int = 768,
) -> tuple[list[Vote], int | None]:  # fmt: skip
    """Votes of a query block's rows by their need; arguments and result as of `always_read` and
    `neediest`."""
    near = always_read(config, keys, rows, first, low, high, logit, sinks, sliding)
    return neediest(config, keys, rows, near, low, high, logit, most)


def neediest(
    config: Any, keys: torch.Tensor, rows: torch.Tensor, near: dict[tuple[int, int], float],
    low: int, high: int, logit: Callable[..., float], most: int = 768,
) -> tuple[list[Vote], int | None]:  # fmt: skip
    """Votes of the rows `[rows, heads, D]` that need the candidates `[low, high)` most: for which
    the best of `most` of their keys stands out most from what they read in any case. The number
    tells how many of them, the first, walk the tree (None: all, for all that may vote do). `near`:
    log-sum-exp of each for what it reads in any case."""
    bk, (count, heads, _) = config.block_k, rows.shape
    ids = [(row, head) for row in asked(config, count) for head in range(heads)]
    allowed = heads if count == 1 else min(len(ids), most_votes(config, heads, low, high))
    walking = None
    if allowed < len(ids):
        sample = sampled_keys(low * bk, high * bk, most)
        need = {
            (r, h): max(logit(rows[r, h], keys[at]) for at in sample) - near[r, h] for r, h in ids
        }
        ids = sorted(ids, key=lambda i: (-need[i], i))
        walking = walkers(config, allowed)
        ids = sorted(ids[:walking]) + sorted(ids[walking:allowed])
    return [(rows[row, head], near[row, head]) for row, head in ids], walking


def asked(config: Any, rows: int) -> list[int]:
    """Of `rows` rows of a query block every second one, counted back from the last; all, if every
    row is to vote."""
    return sorted(range(rows - 1, -1, -1 if config.query_stride == 1 else -2))


def most_votes(config: Any, heads: int, low: int, high: int) -> int:
    """How many rows of a full query block of `heads` heads vote: all that are asked where all keys
    of the candidates `[low, high)` are looked at, for a search would begin with these blocks."""
    if looked_at_whole(config, low, high):
        return heads * config.block_q
    return max(1, math.ceil(heads * config.block_q / config.query_stride))


def looked_at_whole(config: Any, low: int, high: int) -> bool:
    """Whether all keys of the candidates are looked at, and no tree is walked."""
    return config.rescore > 1 and high - low <= 2 * config.beam * config.budget // config.block_k


def walkers(config: Any, votes: int) -> int:
    """How many of the votes of rows chosen by need walk the tree: the others only score what is
    found with all its keys."""
    return math.ceil(votes / config.method_options().descent) if config.rescore > 1 else votes


def sampled_keys(begin: int, end: int, most: int) -> list[int]:
    """The keys of `[begin, end)` that need is estimated from: one in 64, but a quarter of `most` in
    any case, and `most` at most."""
    stride, most = 1, min(most, max(2, most // 4, (end - begin) // 64))
    while len(found := spread(begin, end, stride)) > most:
        stride *= 2
    return found


def spread(begin: int, end: int, stride: int) -> list[int]:
    """A key of each aligned chunk of `stride` keys that lies wholly in `[begin, end)`, at a place
    of its own."""
    chunks = [at // stride for at in range(0, end, stride) if begin <= at and at + stride <= end]
    return [chunk * stride + chunk * 2654435761 % 2**32 * stride // 2**32 for chunk in chunks]


def initial(search: Search) -> list[tuple[int, int]]:
    """Where a search begins: all of the start level, and the edges below it."""
    start = search.start()
    return [(start, i) for i in search.complete(start)] + [
        (n, i) for n in range(start) for i in search.edges(n)
    ]


def oracle(
    keys: torch.Tensor,
    rows: list[tuple[int, torch.Tensor]],
    low: int,
    high: int,
    block_k: int,
    budget: int,
    scale: float,
    softcap: float | None = None,
) -> list[int]:
    """The candidates with the largest share of the rows' attention; `rows` are (position,
    query)."""
    mass = torch.zeros(high - low, dtype=torch.float64)
    for position, row in rows:
        logits = keys[: position + 1] @ row * scale
        weights = torch.softmax(
            logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=0
        )
        for i in range(low, high):
            mass[i - low] += weights[i * block_k : (i + 1) * block_k].sum()
    return sorted(low + int(i) for i in mass.argsort(descending=True, stable=True)[:budget])
