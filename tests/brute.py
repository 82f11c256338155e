"""The tree search and the block oracle once more, written down from the description with loops and dicts, in float64.

Slow and plain on purpose, and nothing of it comes from `hip_hf`: the tests compare block sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Vote = tuple[torch.Tensor, float | None]  # a voting row, and the log-sum-exp of its logits for what it reads in any case


def sampled(rows: torch.Tensor, stride: int) -> list[Vote]:
    """Votes of every `stride`-th of a query block's rows `[rows, heads, D]`, counted back from the last; all heads of each."""
    return [(row, None) for last in range(len(rows) - 1, -1, -stride) for row in rows[last]]


def log_sum_exp(logits: list[float]) -> float:
    most = max(logits)
    return most + math.log(sum(math.exp(x - most) for x in logits))


def always_read(
    config: Any, keys: torch.Tensor, rows: torch.Tensor, first: int, low: int, high: int, logit: Callable[..., float],
    sinks: list[float] | None = None, sliding: int | None = None,
) -> dict[tuple[int, int], float]:  # fmt: skip
    """Log-sum-exp of each row of a query block `[rows, heads, D]`, which begins at position `first`, over what it reads in any
    case: all but the middle `[low, high)`. `logit(row, key)` scales and caps; `sinks`: an extra logit for each head."""
    bk, (count, heads, _), near = config.block_k, rows.shape, {}
    for row, head in ((row, head) for row in range(count) for head in range(heads)):
        seen = [*range(low * bk), *range(high * bk, first + row + 1)]
        seen = [at for at in seen if sliding is None or at > first + row - sliding]
        near[row, head] = log_sum_exp([logit(rows[row, head], keys[at]) for at in seen] + ([sinks[head]] if sinks else []))
    return near


def by_need(
    config: Any, keys: torch.Tensor, rows: torch.Tensor, first: int, low: int, high: int, logit: Callable[..., float],
    sinks: list[float] | None = None, sliding: int | None = None, most: int = 1024,
) -> tuple[list[Vote], int | None]:  # fmt: skip
    """Votes of a query block's rows by their need; arguments and result as of `always_read` and `neediest`."""
    near = always_read(config, keys, rows, first, low, high, logit, sinks, sliding)
    return neediest(config, keys, rows, near, low, high, logit, most)


def neediest(
    config: Any, keys: torch.Tensor, rows: torch.Tensor, near: dict[tuple[int, int], float], low: int, high: int,
    logit: Callable[..., float], most: int = 1024,
) -> tuple[list[Vote], int | None]:  # fmt: skip
    """Votes of the rows `[rows, heads, D]` that need the middle `[low, high)` most: for which the best of `most` of its keys
    stands out most from what they read in any case. So many of them, the first, walk the tree (None: all, for all that may vote
    do). `near`: log-sum-exp of each for what it reads in any case."""
    bk, (count, heads, _) = config.block_k, rows.shape
    ids = [(row, head) for row in asked(config, count) for head in range(heads)]
    allowed = heads if count == 1 else min(len(ids), max(1, math.ceil(heads * config.block_q / config.query_stride)))
    walking = None
    if allowed < len(ids):
        stride = 1
        while len(sample := spread(low * bk, high * bk, stride)) > most:
            stride *= 2
        need = {(r, h): max(logit(rows[r, h], keys[at]) for at in sample) - near[r, h] for r, h in ids}
        ids = sorted(ids, key=lambda i: (-need[i], i))
        walking = walkers(config, allowed)
        ids = sorted(ids[:walking]) + sorted(ids[walking:allowed])
    return [(rows[row, head], near[row, head]) for row, head in ids], walking


def asked(config: Any, rows: int) -> list[int]:
    """Of so many rows of a query block every second one, counted back from the last; all, if every row is to vote."""
    return sorted(range(rows - 1, -1, -1 if config.query_stride == 1 else -2))


def walkers(config: Any, votes: int) -> int:
    """How many of the votes of rows chosen by need walk the tree: the others only score what is found with all its keys."""
    return math.ceil(votes / config.method_options().descent) if config.rescore > 1 else votes


def spread(begin: int, end: int, stride: int) -> list[int]:
    """A key of each aligned chunk of `stride` keys that lies wholly in `[begin, end)`, at a place of its own."""
    chunks = [at // stride for at in range(0, end, stride) if begin <= at and at + stride <= end]
    return [chunk * stride + chunk * 2654435761 % 2**32 * stride // 2**32 for chunk in chunks]


Chunk = tuple[int, int]  # level, index: the keys [index * size, (index + 1) * size) with size = block_k << level


@dataclass
class Search:
    """One search: `config` (any object with its fields), the keys `[T, D]`, the votes, and the middle `[low, high)` in key
    blocks."""

    config: Any
    keys: torch.Tensor
    votes: list[Vote]
    low: int
    high: int
    scale: float
    softcap: float | None = None
    weight: float = 0.5
    walking: int | None = None  # so many of the votes, the first, walk the tree; None: all

    def size(self, level: int) -> int:
        return self.config.block_k * 2**level

    def complete(self, level: int) -> list[int]:
        """Chunks of a level that lie wholly in the middle."""
        begin, end, size = self.low * self.config.block_k, self.high * self.config.block_k, self.size(level)
        return [i for i in range(end // size + 1) if begin <= i * size and (i + 1) * size <= end]

    def start(self) -> int:
        most = 2 * self.config.beam * self.config.budget // self.config.block_k
        level = 0
        while len(self.complete(level)) > most and self.size(level) != self.config.coarsest:
            level += 1
        return level

    def edges(self, level: int) -> list[int]:
        """Chunks of a level in the middle whose parent is not: nobody's children."""
        parents = self.complete(level + 1)
        return [i for i in self.complete(level) if i // 2 not in parents]

    def initial(self) -> list[Chunk]:
        """Where the search begins: all of the start level, and the edges below it."""
        start = self.start()
        return [(start, i) for i in self.complete(start)] + [(n, i) for n in range(start) for i in self.edges(n)]

    def logit(self, row: torch.Tensor, chunk: Chunk) -> float:
        """What a voting row makes of a chunk, through the chunk's representative."""
        level, index = chunk
        inside = self.keys[index * self.size(level) : (index + 1) * self.size(level)]
        mean = float(row @ inside.mean(0))
        bound = float(torch.maximum(row * inside.amax(0), row * inside.amin(0)).sum())
        by_name: dict[str, Callable[[], float]] = {
            "minmax": lambda: bound,
            "blend": lambda: (1 - self.weight) * mean + self.weight * bound,
            "middle": lambda: float(row @ inside[len(inside) // 2]),
        }
        return self.capped(by_name[self.config.representative]())

    def capped(self, product: float) -> float:
        logit = product * self.scale
        return logit if self.softcap is None else self.softcap * math.tanh(logit / self.softcap)

    def scores(self, logits: dict[Any, list[float]], size: int, votes: list[Vote]) -> dict[Any, float]:
        """One score per candidate, of `size` keys each, from its logits, one for each of `votes`."""
        if self.config.score == "max":
            return {c: max(values) for c, values in logits.items()}
        shares: dict[Any, list[float]] = {c: [] for c in logits}
        for r, (_, near) in enumerate(votes):
            others = [] if near is None else [near - math.log(size)]
            whole = log_sum_exp([values[r] for values in logits.values()] + others)
            for c, values in logits.items():
                shares[c].append(math.exp(values[r] - whole))
        return {c: sum(values) for c, values in shares.items()}

    def keep(self, scores: dict[int, float], count: int) -> list[int]:
        return sorted(scores, key=lambda i: (-scores[i], i))[:count]

    def exact(self, blocks: list[int]) -> dict[int, float]:
        """Scores of blocks by all of their keys."""
        bk, score = self.config.block_k, {}
        logits = {
            i: [[self.capped(float(row @ self.keys[i * bk + j])) for j in range(bk)] for row, _ in self.votes] for i in blocks
        }
        if self.config.score == "max":
            return {i: max(max(own) for own in logits[i]) for i in blocks}
        for i in blocks:
            shares = []
            for r, (_, near) in enumerate(self.votes):
                whole = log_sum_exp([x for own in logits.values() for x in own[r]] + ([] if near is None else [near]))
                shares.append(sum(math.exp(x - whole) for x in logits[i][r]))
            score[i] = sum(shares)
        return score

    def read_on(self, found: dict[int, float]) -> dict[int, float]:
        """Each block's score, with a share of that of the block before it."""
        onward = self.config.method_options().onward if self.config.score == "mass" else 0
        return {i: score + onward * found.get(i - 1, 0) for i, score in found.items()}

    def run(self) -> list[int]:
        """The selected blocks."""
        budget = self.config.budget // self.config.block_k
        if self.config.rescore > 1 and self.high - self.low <= 2 * self.config.beam * budget:
            return sorted(self.keep(self.read_on(self.exact(list(range(self.low, self.high)))), budget))
        level = self.start()
        candidates = self.complete(level)
        while True:
            walking = self.votes[: self.walking]
            logits = {i: [self.logit(row, (level, i)) for row, _ in walking] for i in candidates}
            scores = self.scores(logits, self.size(level), walking)
            if level == 0:
                break
            kept = self.keep(scores, self.config.beam * budget)
            level -= 1
            candidates = [half for i in kept for half in (2 * i, 2 * i + 1)] + self.edges(level)
        if self.config.rescore > 1:
            scores = self.read_on(self.exact(self.keep(scores, self.config.rescore * budget)))
        return sorted(self.keep(scores, budget))


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
    """The blocks of the middle with the largest share of the rows' attention; `rows` are (position, query)."""
    mass = torch.zeros(high - low, dtype=torch.float64)
    for position, row in rows:
        logits = keys[: position + 1] @ row * scale
        weights = torch.softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=0)
        for i in range(low, high):
            mass[i - low] += weights[i * block_k : (i + 1) * block_k].sum()
    return sorted(low + int(i) for i in mass.argsort(descending=True, stable=True)[:budget])
