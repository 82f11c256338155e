"""The tree search of `hip.py` once more, written down with loops and lists for one query block: to
be read, and for the tests.

What `hip.py` finds for many query blocks and heads at once by products of matrices, this finds
chunk by chunk and vote by vote. The tests hold the two equal, block for block. Nothing of the
package is used but the settings.

The keys between sink and window, the searched range, are cut into blocks of `block_k` keys; a chunk
of level `n` is `2 ** n` blocks that follow one another. A *vote* is a query row that has a say, and
what it finds in sink and window: the log-sum-exp of its logits there, or None if it does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# The row `[D]`, and its log-sum-exp over sink and window.
Vote: TypeAlias = tuple[Tensor, float | None]


def log_sum_exp(logits: list[float]) -> float:
    """The logarithm of the sum of the logits' exponentials."""
    most = max(logits)
    return most + math.log(sum(math.exp(x - most) for x in logits))


@dataclass
class Search:
    """One search: settings, the keys `[T, D]` of one head, the votes, and the searched range
    `[low, high)` in key blocks.

    `weight`: share of the bound in `blend`. `onward`: share of a block's score, by mass, that the
    block after it gets as well. `walking`: how many votes, the first, walk the tree; None: all.
    """

    config: HiPConfig
    keys: Tensor
    votes: list[Vote]
    low: int
    high: int
    scale: float
    softcap: float | None = None
    weight: float = 0.5
    onward: float = 0.3
    walking: int | None = None

    def run(self) -> list[int]:
        """The selected blocks: start with few chunks, keep the best, look at their halves, down to
        single blocks."""
        config = self.config
        if config.rescore_blocks and self.high - self.low <= 2 * config.beam_blocks:
            return sorted(best(self.judged(list(range(self.low, self.high))), config.budget_blocks))
        level = self.start()
        candidates = self.complete(level)
        scores = self.scored(level, candidates)
        while level > 0:
            kept = best(scores, config.beam_blocks)
            level -= 1
            candidates = [half for i in kept for half in (2 * i, 2 * i + 1)] + self.edges(level)
            scores = self.scored(level, candidates)
        if config.rescore_blocks:
            scores = self.judged(best(scores, config.rescore_blocks))
        return sorted(best(scores, config.budget_blocks))

    # Which chunks there are.

    def size(self, level: int) -> int:
        """Keys of a chunk."""
        return self.config.block_k * 2**level

    def complete(self, level: int) -> list[int]:
        """Chunks of a level that lie wholly in the searched range."""
        begin, end = self.low * self.config.block_k, self.high * self.config.block_k
        size = self.size(level)
        return [i for i in range(end // size + 1) if begin <= i * size and (i + 1) * size <= end]

    def start(self) -> int:
        """The level to start with: the smallest that has few enough chunks."""
        level, most = 0, 2 * self.config.beam_blocks
        while len(self.complete(level)) > most and self.size(level) != self.config.coarsest:
            level += 1
        return level

    def edges(self, level: int) -> list[int]:
        """Chunks of a level in the searched range whose parent is not: nobody's children."""
        parents = self.complete(level + 1)
        return [i for i in self.complete(level) if i // 2 not in parents]

    # What they are worth.

    def capped(self, product: float) -> float:
        """The logit of a product of a query with a key."""
        logit = product * self.scale
        return logit if self.softcap is None else self.softcap * math.tanh(logit / self.softcap)

    def logit(self, row: Tensor, level: int, index: int) -> float:
        """What a row makes of a chunk, through what stands for the chunk."""
        inside = self.keys[index * self.size(level) : (index + 1) * self.size(level)]
        if self.config.representative == "middle":
            return self.capped(float(row @ inside[len(inside) // 2]))
        bound = float(torch.maximum(row * inside.amax(0), row * inside.amin(0)).sum())
        if self.config.representative == "minmax":
            return self.capped(bound)
        return self.capped((1 - self.weight) * float(row @ inside.mean(0)) + self.weight * bound)

    def scored(self, level: int, candidates: list[int]) -> dict[int, float]:
        """Scores of chunks by what stands for them."""
        votes = self.votes[: self.walking]
        logits = {i: [[self.logit(row, level, i)] for row, _ in votes] for i in candidates}
        return self.scores(logits, votes, self.size(level))

    def judged(self, blocks: list[int]) -> dict[int, float]:
        """Scores of blocks by all of their keys, with a share of those of the blocks before."""
        bk = self.config.block_k
        logits = {}
        for i in blocks:
            keys = self.keys[i * bk : (i + 1) * bk]
            logits[i] = [[self.capped(float(row @ key)) for key in keys] for row, _ in self.votes]
        found = self.scores(logits, self.votes, 1)
        onward = self.onward if self.config.score == "mass" else 0
        return {i: score + onward * found.get(i - 1, 0) for i, score in found.items()}

    def scores(
        self, logits: dict[int, list[list[float]]], votes: list[Vote], size: int
    ) -> dict[int, float]:
        """Scores of candidates, for each of which `logits` has some of each vote; each logit stands
        for `size` keys."""
        if self.config.score == "max":
            return {i: max(max(some) for some in own) for i, own in logits.items()}
        totals = dict.fromkeys(logits, 0.0)
        for n, (_, near) in enumerate(votes):
            always = [] if near is None else [near - math.log(size)]
            whole = log_sum_exp([x for own in logits.values() for x in own[n]] + always)
            for i, own in logits.items():
                totals[i] += sum(math.exp(x - whole) for x in own[n])
        return totals


def best(scores: dict[int, float], count: int) -> list[int]:
    """The `count` candidates with the highest scores; ties go to the lower one."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:count]
