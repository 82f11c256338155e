"""Votes by need: which query rows decide what their query block reads between sink and window.

Most rows of a real model spend their attention on the first tokens and on their neighbours; a few
look something up far away. If all rows counted alike, or their mean did, the many would outvote
these few. The *need* of a row is how far a key there stands out from all that the row reads in any
case, `highest - lse_near`:

    sink  [ . . . candidates . . . ]  window, own block
    \\______________________________________________/
      lse_near: log-sum-exp over sink and window, exact (attention computes it anyway)
               highest: the largest logit among a sample of the candidates' keys

Of every second row of a query block those with the largest need vote, each with its own query.
Where all of these vote (decode, short blocks, `query_stride` of 1 and 2, contexts so short that all
keys are looked at), nothing is estimated: the search weighs every vote by what it finds near
(`aggregate` in `ranking.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.cache.pages import KeyRows, pick
from hip_hf.config import refuse
from hip_hf.methods import base
from hip_hf.methods.ranking import best, sampled_rows, squash
from hip_hf.workers import scratch

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.geometry import QueryBlock
    from hip_hf.methods.pyramid import Pyramid


# Knuth's multiplier, 2 ** 32 over the golden ratio: neighbouring chunks get offsets that are far
# apart.
SPREAD = 2654435761
# One row in `ASKED` is asked for its need.
ASKED = 2
# Need is estimated from one key in `SPACING`, within limits that `sample` sets.
SPACING = 64
# Votes, what each finds near, and how many of them walk the tree (`BoundSelectorByNeed._votes`).
Votes = tuple[Tensor, Tensor | None, int]


@dataclass(frozen=True)
class Options:
    """`weight`: share of the bound in `blend`, 0 to 1. `sample`: the most keys that need is
    estimated from, one in 64. `descent`: of the votes by need, one in `descent` walks the tree, the
    neediest; all of them score what these find. `onward`: the share of a block's score, by the mass
    in its keys, that the block after it gets as well, 0 to 1."""

    weight: float = 0.5
    sample: int = 768
    descent: int = 2
    onward: float = 0.3

    def __post_init__(self) -> None:
        for name in ("weight", "onward"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                refuse(f"options[{name!r}]", value, "0 to 1")
        for name, least in (("sample", 2), ("descent", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                refuse(f"options[{name!r}]", value, f"an integer >= {least}")


def asked_rows(config: HiPConfig, rows: int) -> range:
    """Which of a query block's `rows` rows are asked for their need, and may vote: every second
    one, counted back from the last, for what one row looks up the next one reads on; all of them
    with `query_stride=1`."""
    step = min(config.query_stride, ASKED)
    return range((rows - 1) % step, rows, step)


def votes_of(config: HiPConfig, rows: int, heads: int, whole: bool) -> int:
    """How many votes a query block of `rows` rows casts, whose `heads` heads share a selection: no
    more than are asked, and all of these where its candidates are looked at `whole`, for then no
    tree is walked that fewer votes would make cheaper. A row that is alone (decode) votes with all
    of its heads."""
    if rows == 1:
        return heads
    asked = len(asked_rows(config, rows)) * heads
    return asked if whole else min(asked, -(-heads * config.block_q // config.query_stride))


def walkers_of(config: HiPConfig, votes: int) -> int:
    """How many of `votes` by need walk the tree: all, where nothing is scored again at its
    end."""
    return -(-votes // base.options_of(config, Options).descent) if config.rescore_blocks else votes


def most_sampled(config: HiPConfig, low: int, high: int) -> int:
    """From how many keys of the blocks `low` to `high - 1` need is estimated at most: one in
    `SPACING`, but a quarter of `sample` in any case, and no more than `sample`. With two at least,
    a chunk always lies inside."""
    most = base.options_of(config, Options).sample
    return min(most, max(2, most // 4, (high - low) * config.block_k // SPACING))


def sampled_chunks(config: HiPConfig, low: int, high: int, level: int) -> tuple[int, int]:
    """First and end of the chunks of `2 ** level` keys that lie in the blocks `low` to
    `high - 1`."""
    return -(-low * config.block_k >> level), high * config.block_k >> level


def sample_level(config: HiPConfig, low: int, high: int, most: int) -> int:
    """The smallest level at which at most `most` chunks of `2 ** level` keys lie in the
    blocks `low` to `high - 1`."""
    level = 0
    while True:
        first, end = sampled_chunks(config, low, high, level)
        if end - first <= most:
            return level
        level += 1


def sampled_keys(keys: KeyRows, first: int, end: int, level: int, dtype: torch.dtype) -> Tensor:
    """A key of each chunk `first` to `end - 1` of `2 ** level` keys: `[heads, end - first, D]` of
    keys `[heads, T, D]`.

    Which one differs from chunk to chunk, so that no pattern in the text hides from the sample, but
    never changes."""
    chunk = torch.arange(first, end, device=keys.device)
    at = (chunk << level) + ((chunk * SPREAD & 0xFFFFFFFF) >> 32 - level)
    return pick(keys, at.expand(keys.shape[0], -1), 1).to(dtype)


def highest(q: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    """Largest logit `[heads, R]`, fp32 at least, of scaled queries `[heads, R, D]` for keys
    `[heads, n, D]`."""
    logits = torch.bmm(
        q, keys.transpose(1, 2), out=scratch.take("logits", (*q.shape[:2], keys.shape[1]), q)
    )
    most = logits.amax(-1).to(torch.promote_types(q.dtype, torch.float32))
    squash(most, softcap)  # keeps the order
    return most


class BoundSelectorByNeed(base.BoundSelector):
    """A rule that weighs how much each row attends to what it always reads."""

    config: HiPConfig
    q: Tensor
    keys: KeyRows
    pyramid: Pyramid
    scale: float
    softcap: float | None

    def select(self, heads: slice, blocks: list[QueryBlock], near: Tensor | None = None) -> Tensor:
        """As `BoundSelector.select` says."""
        raise NotImplementedError

    def _votes(
        self, heads: slice, blocks: list[QueryBlock], near: Tensor | None, level: int, whole: bool
    ) -> Votes:
        """Votes `[heads, S * len(blocks), R, D]`, scaled, in the pyramid's dtype, the log-sum-exp
        of what each always reads, and how many of them, the first, walk the tree. The need is
        estimated from a key of each chunk of `2 ** level` keys; `whole`: there is no tree to walk,
        and every row that is asked votes."""
        config, rows, first = self.config, blocks[0].rows, blocks[0].row
        if near is None:
            rows_of = [list(sampled_rows(block, config.query_stride)) for block in blocks]
            index = torch.tensor(rows_of, device=self.q.device)
            q = self._grouped(self.q[heads][:, :, index].to(self.pyramid.dtype) * self.scale)
            return q, None, q.shape[2]
        # query blocks of one call follow one another
        q = self.q[heads, :, first : first + len(blocks) * rows].unflatten(2, (-1, rows))
        members = q.shape[1] if config.group_shared else 1
        count, asked = votes_of(config, rows, members, whole), asked_rows(config, rows)
        some = slice(asked.start, asked.stop, asked.step)
        q = self._grouped(q[:, :, :, some].to(self.pyramid.dtype) * self.scale)
        near = self._grouped(near.unflatten(2, (-1, rows, 1))[:, :, :, some])[..., 0]
        if count == q.shape[2]:
            return q, near, count
        need = self._highest(heads, blocks, q, level).sub_(near)
        every = torch.arange(q.shape[2], device=q.device).expand(need.shape)
        chosen = best(need, every, count).sort(dim=-1).values
        walking = walkers_of(config, count)
        if walking < count:
            walkers = best(need.gather(-1, chosen), every[..., :count], walking)
            walks = torch.zeros_like(chosen).scatter_(-1, walkers, 1)
            chosen = chosen.gather(-1, walks.argsort(dim=-1, descending=True, stable=True))
        votes = q.gather(2, chosen[..., None].expand(*chosen.shape, q.shape[-1]))
        return votes, near.gather(2, chosen), walking

    def _grouped(self, x: Tensor) -> Tensor:
        """`[heads, G, P, R, n]` -> `[heads, S * P, rows of all heads that share a mask, n]`, by
        position."""
        if self.config.group_shared:
            return x.permute(0, 2, 3, 1, 4).flatten(2, 3)
        return x.flatten(1, 2).contiguous()

    def _highest(self, heads: slice, blocks: list[QueryBlock], q: Tensor, level: int) -> Tensor:
        """Largest logit `[heads, S * P, R]` of scaled queries `[heads, S * P, R, D]` for the
        sampled keys of what each searches."""
        spans = [sampled_chunks(self.config, block.low, block.high, level) for block in blocks]
        start, stop = min(first for first, _ in spans), max(end for _, end in spans)
        keys = sampled_keys(self.keys[heads], start, stop, level, q.dtype)
        out = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for i in range(q.shape[1]):
            first, end = spans[i % len(blocks)]
            out[:, i] = highest(q[:, i], keys[:, first - start : end - start], self.softcap)
        return out
