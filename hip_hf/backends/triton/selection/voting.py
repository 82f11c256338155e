"""Who votes in the search of a query block, and how many of them walk the tree (`methods/need.py`
says why)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hip_hf.methods.need import asked_rows, votes_of, walkers_of

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


@triton.jit
def count_asked(rows, MEMBERS: tl.constexpr, STRIDE: tl.constexpr):
    """Return how many of a query block's `rows` rows of `MEMBERS` heads may vote (scalars)."""
    return MEMBERS * ((rows - 1) // STRIDE + 1)


@triton.jit
def count_votes(
    rows, candidates, MEMBERS: tl.constexpr, VOTES: tl.constexpr, VOTES_WHOLE: tl.constexpr,
    MOST: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Return how many votes a query block of `rows` rows of `MEMBERS` heads casts (scalars): at
    most `VOTES`, or at most `VOTES_WHOLE` where its `candidates` are looked at whole, which is
    where they are no more than `MOST`."""
    most = VOTES
    if VOTES_WHOLE > VOTES:
        most = tl.where(candidates <= MOST, VOTES_WHOLE, VOTES)
    return tl.where(rows == 1, MEMBERS, tl.minimum(count_asked(rows, MEMBERS, STRIDE), most))


@triton.jit
def count_walkers(votes, rows, MEMBERS: tl.constexpr, STRIDE: tl.constexpr, WALKERS: tl.constexpr):
    """Return how many of the `votes` of a query block of `rows` rows walk the tree (scalars): all
    of them where all rows that may vote do."""
    return tl.where(votes < count_asked(rows, MEMBERS, STRIDE), tl.minimum(WALKERS, votes), votes)


@dataclass(frozen=True)
class Voting:
    """Who votes in a search: settled by settings and shapes alone.

    `members`: query heads that share a selection. Every `stride`-th row may vote, counted back from
    a query block's last: `asked` of a full one. `votes`: of a full query block, of which `walkers`
    walk the tree; `votes_whole`: if candidates are looked at whole. `slots`: room for those of any.
    `ranked`: rows are chosen by need. `chosen`: votes are put side by side for the search, else it
    reads the queries themselves. `weighed`: the search counts how much a row finds near.
    """

    members: int
    votes: int
    votes_whole: int
    walkers: int
    slots: int
    stride: int
    asked: int
    ranked: bool
    chosen: bool
    weighed: bool

    @staticmethod
    def of(config: HiPConfig, group: int, block_q: int, extended: bool) -> Voting:
        """Return the voting of query blocks of `block_q` rows (1: decode) with `group` query heads
        per key head. `extended`: whether votes are rotated to their places under context
        extension."""
        members, by_need = group if config.group_shared else 1, config.vote == "need"
        stride = asked_rows(config, block_q).step if by_need else config.query_stride
        asked = -(-block_q // stride)
        of_need = (
            votes_of(config, block_q, members, whole)
            for whole in (False, config.rescore_blocks > 0)
        )
        votes, votes_whole = of_need if by_need else (members * asked,) * 2
        slots = max(votes_whole, members)
        ranked = votes < members * asked
        weighed = by_need and config.score == "mass"
        walkers = walkers_of(config, votes) if ranked else slots
        chosen = ranked or extended
        return Voting(
            members, votes, votes_whole, walkers, slots, stride, asked, ranked, chosen, weighed
        )
