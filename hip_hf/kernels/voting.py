"""Who votes in the search of a query block, and how many of them walk the tree (`methods/need.py` says why)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hip_hf.methods.need import walkers_of

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


@triton.jit
def count_votes(rows, VOTERS: tl.constexpr, VOTES: tl.constexpr, STRIDE: tl.constexpr, SAMPLED: tl.constexpr):
    """How many votes a query block of so many rows of `VOTERS` heads casts."""
    if SAMPLED:
        return VOTERS * ((rows - 1) // STRIDE + 1)
    else:
        return tl.where(rows == 1, VOTERS, tl.minimum(VOTERS * rows, VOTES))


@triton.jit
def count_walkers(votes, rows, VOTERS: tl.constexpr, WALKERS: tl.constexpr):
    """How many of the `votes` of a query block of so many rows walk the tree: all, where all rows vote."""
    return tl.where(votes < VOTERS * rows, tl.minimum(WALKERS, votes), votes)


@dataclass(frozen=True)
class Voting:
    """Who votes in a search: settled by settings and shapes alone.

    `voters`: query heads that share a selection. `votes`: of a full query block, of which `walkers` walk the tree. `slots`: room
    for those of any. `ranked`: rows are chosen by need. `chosen`: votes are put side by side for the search, else it reads the
    queries themselves. `weighed`: the search counts how much a row finds near.
    """

    voters: int
    votes: int
    walkers: int
    slots: int
    stride: int
    sampled: bool
    ranked: bool
    chosen: bool
    weighed: bool

    @staticmethod
    def of(config: HiPConfig, group: int, block_q: int, extended: bool) -> Voting:
        voters, sampled = group if config.group_shared else 1, config.vote == "sampled"
        rows = voters * block_q
        votes = min(rows, max(1, -(-rows // config.query_stride))) if block_q > 1 else voters
        slots = voters * -(-block_q // config.query_stride) if sampled else max(votes, voters)
        ranked = not sampled and votes < rows
        stride = config.query_stride if sampled else 1
        weighed = not sampled and config.score == "mass"
        walkers = walkers_of(config, votes) if ranked else slots
        return Voting(voters, votes, walkers, slots, stride, sampled, ranked, ranked or extended, weighed)
