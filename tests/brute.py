"""The tree search and the block oracle once more, written down from the description with loops and dicts, in float64.

Slow and plain on purpose, and nothing of it comes from `hip_hf`: the tests compare block sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def votes(rows: torch.Tensor, stride: int, vote: str) -> list[torch.Tensor]:
    """The voting vectors `[heads, D]` of a query block's rows `[rows, heads, D]`, from the last row back."""
    groups = [list(range(max(0, last - stride + 1), last + 1)) for last in range(len(rows) - 1, -1, -stride)]
    if vote == "sampled" or stride == 1:
        return [rows[group[-1]] for group in groups]
    per_head = [_made(rows[:, head], groups, 2 if vote == "clustered" else 0) for head in range(rows.shape[1])]
    return [torch.stack(each) for each in zip(*per_head, strict=True)]


def _made(rows: torch.Tensor, groups: list[list[int]], rounds: int) -> list[torch.Tensor]:
    """One head's votes: the mean direction of each group of rows at their mean length, after rounds of changing sides."""
    first, lengths = groups, rows.square().sum(-1).sqrt()
    for left in range(rounds, -1, -1):
        means = [rows[group].mean(0) for group in groups]
        directions = [mean / mean.square().sum().sqrt() for mean in means]
        if not left:
            return [direction * lengths[group].mean() for direction, group in zip(directions, groups, strict=True)]
        # the last groups come first here: ties, of equal rows, go to the earlier rows' vote
        nearest = [max(range(len(groups)), key=lambda n: (float(row @ directions[n]), n)) for row in rows]
        groups = [[i for i, n in enumerate(nearest) if n == vote] or first[vote] for vote in range(len(groups))]
    raise AssertionError


Chunk = tuple[int, int]  # level, index: the keys [index * size, (index + 1) * size) with size = block_k << level


@dataclass
class Search:
    """One search: `config` (any object with its fields), the keys `[T, D]`, the voting rows `[R, D]`, and the middle
    `[low, high)` in key blocks."""

    config: Any
    keys: torch.Tensor
    rows: torch.Tensor
    low: int
    high: int
    scale: float
    softcap: float | None = None
    lasting: bool = False  # later decode steps will use the selection
    weight: float = 0.5
    outliers: int = 4

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

    def extremes(self, level: int, index: int) -> torch.Tensor:
        """The chunk's outliers: of a block its keys farthest from their mean, above that of the halves' outliers."""
        inside = self.keys[index * self.size(level) : (index + 1) * self.size(level)]
        mean = inside.mean(0)
        if level:
            inside = torch.cat([self.extremes(level - 1, 2 * index), self.extremes(level - 1, 2 * index + 1)])
        far = sorted(range(len(inside)), key=lambda j: -float((inside[j] - mean).square().sum()))
        return inside[far[: self.outliers]]

    def logit(self, row: torch.Tensor, chunk: Chunk) -> float:
        """What a voting row makes of a chunk, through the chunk's representative."""
        level, index = chunk
        inside = self.keys[index * self.size(level) : (index + 1) * self.size(level)]
        mean = float(row @ inside.mean(0))
        bound = float(torch.maximum(row * inside.amax(0), row * inside.amin(0)).sum())
        by_name: dict[str, Callable[[], float]] = {
            "mean": lambda: mean,
            "minmax": lambda: bound,
            "blend": lambda: (1 - self.weight) * mean + self.weight * bound,
            "outliers": lambda: max(mean, *(float(row @ key) for key in self.extremes(level, index))),
            "middle": lambda: float(row @ inside[len(inside) // 2]),
            "first": lambda: float(row @ inside[0]),
            "last": lambda: float(row @ inside[-1]),
        }
        return self.capped(by_name[self.config.representative]())

    def capped(self, product: float) -> float:
        logit = product * self.scale
        return logit if self.softcap is None else self.softcap * math.tanh(logit / self.softcap)

    def scores(self, logits: dict[Any, list[float]]) -> dict[Any, float]:
        """One score per candidate from its logits, one for each row."""
        if self.config.score == "max":
            return {c: max(values) for c, values in logits.items()}
        total = dict.fromkeys(logits, 0.0)
        for r in range(len(self.rows)):
            most = max(values[r] for values in logits.values())
            weights = {c: math.exp(values[r] - most) for c, values in logits.items()}
            norm = sum(weights.values())
            for c, weight in weights.items():
                total[c] += weight / norm
        return total

    def keep(self, scores: dict[int, float], count: int) -> list[int]:
        return sorted(scores, key=lambda i: (-scores[i], i))[:count]

    def exact(self, blocks: list[int]) -> dict[int, float]:
        """Scores of blocks by all of their keys."""
        bk = self.config.block_k
        logits = {(i, j): [self.capped(float(r @ self.keys[i * bk + j])) for r in self.rows] for i in blocks for j in range(bk)}
        by_key = self.scores(logits)
        join = max if self.config.score == "max" else sum
        return {i: join(by_key[i, j] for j in range(bk)) for i in blocks}

    def run(self) -> list[int]:
        """The selected blocks."""
        budget = self.config.budget // self.config.block_k
        level = self.start()
        candidates = self.complete(level)
        while True:
            scores = self.scores({i: [self.logit(row, (level, i)) for row in self.rows] for i in candidates})
            if level == 0:
                break
            kept = self.keep(scores, self.config.beam * budget)
            level -= 1
            candidates = [half for i in kept for half in (2 * i, 2 * i + 1)] + self.edges(level)
        if self.config.rescore > 1:
            scores = self.exact(self.keep(scores, self.config.rescore * budget))
        if self.lasting:  # a quarter of the blocks follow the best ones: a copy reads on
            for i in self.keep(scores, budget // 4):
                if i + 1 < self.high:
                    scores[i + 1] = math.inf
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
