"""HiP's tree search (HiP, arXiv 2406.09827, section 3): the key blocks with the most attention, in
O(log T) per query block.

The search descends the pyramid of chunk summaries (`pyramid.py`). At each level it scores its
candidate chunks for a query block, keeps the best, and replaces each by its two halves, down to
single key blocks:

    level 3   [       |       |       |       ]        start: few enough chunks to score them all
    level 2       [   |   ]       [   |   ]     [  ]   children of the kept, and a chunk at the edge
    level 1       [ | ]             [ | ]
    level 0        []               [][]               the best `budget / block_k` blocks: attended

Only complete chunks that lie wholly inside the searched range (between sink and window,
`QueryBlock.low` to `high`) are candidates, so no summary holds a key that the block may not see.
Where a coarse chunk would straddle an edge of the range, its child stands in its place at the
child's level: at most one at either end of each level. With these, the candidates cover every block
of the range exactly once; no key is overlooked.

With `rescore`, the best blocks of level 0 are judged again by all of their keys. A search that
would start at level 0 needs no summaries: it looks at all keys between sink and window, and every
second row votes in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from hip_hf.cache.pages import KeyRows, block_index, head_rows_of
from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock
from hip_hf.methods import base
from hip_hf.methods.need import (
    BoundSelectorByNeed,
    Options,
    Votes,
    asked_rows,
    most_sampled,
    sample_level,
    sampled_chunks,
    votes_of,
    walkers_of,
)
from hip_hf.methods.pyramid import Pyramid, Representative, make_representative
from hip_hf.methods.ranking import NO_CHUNK, aggregate, best, read_on, sampled_rows
from hip_hf.rope import Positions, farthest_chunk, rotate
from hip_hf.workers import scratch

# Bytes of summaries or keys that are gathered before they are scored: what is still in cache need
# not be fetched again.
GATHERED_AT_ONCE = 1 << 21
# Logits weighed at a time where candidates are looked at whole: fewer than
# `workers.LOGITS_AT_ONCE`, since weighing goes through them several times.
VOTES_AT_ONCE = 1 << 18


def start_level(config: HiPConfig, low: int, high: int) -> int:
    """The smallest level at which blocks `low` to `high` make at most `start_blocks` chunks, or
    `coarsest`."""
    coarsest = config.coarsest
    limit = (coarsest // config.block_k).bit_length() - 1 if coarsest else high.bit_length()
    level = 0
    while level < limit and (high >> level) - _ceil_shift(low, level) > config.start_blocks:
        level += 1
    return level


def looked_at_whole(config: HiPConfig, low: int, high: int) -> bool:
    """Whether blocks `low` to `high` are few enough to score all of them with all their keys,
    without a descent: no more than a search starts with."""
    return config.rescore_blocks > 0 and high - low <= config.start_blocks


def _ceil_shift(x: int, level: int) -> int:
    return -(-x >> level)


def _room_for(shape: tuple[int, ...], near: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer for logits of that shape as `aggregate` takes them, with a column more for `near`,
    and the part of it that is for logits."""
    logits = scratch.take("logits", (*shape[:-1], shape[-1] + (near is not None)), like)
    return logits, logits[..., : shape[-1]]


def onward_of(config: HiPConfig) -> float:
    """The share of a block's score that the next block gets as well: none of best logits."""
    return base.options_of(config, Options).onward if config.score == "mass" else 0.0


class Selector(base.Selector):
    """The search with its settings bound; `bind` adds a span's tensors."""

    reads_pages = True
    extends = True

    def __init__(self, config: HiPConfig) -> None:
        super().__init__(config)
        weight = base.options_of(config, Options).weight
        self.representative = make_representative(config.representative, weight)
        self.asks_need = config.vote == "need"

    def make_pyramid(self, dtype: torch.dtype) -> Pyramid:
        return Pyramid(self.representative, self.config.block_k, dtype)

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int]:
        config, low, high = self.config, block.low, block.high
        features = self.representative.features(torch.empty(1, dim)).shape[-1]
        level = start_level(config, low, high)
        candidates = (high >> level) - _ceil_shift(low, level)
        scored, exact = candidates, config.rescore_blocks
        for _ in range(level):
            # the halves of what is kept, and a chunk at either edge of the searched range
            candidates = 2 * min(config.beam_blocks, candidates) + 2
            scored += candidates
        whole = looked_at_whole(config, low, high)
        if whole:
            scored, exact = 0, candidates
        walked, looked = scored * features, min(exact, candidates) * config.block_k * dim
        if config.vote == "sampled":
            votes = len(sampled_rows(block, config.query_stride))
            return votes * 2 * (walked + looked), walked + looked
        # of one query head: heads that share a mask have as many votes together as alone, but for
        # rounding
        asked, votes = len(asked_rows(config, block.rows)), votes_of(config, block.rows, 1, whole)
        walkers, sampled = votes, 0
        if votes < asked:
            walkers = walkers_of(config, votes)
            level = sample_level(config, low, high, most_sampled(config, low, high))
            first, end = sampled_chunks(config, low, high, level)
            sampled = end - first
        products = walkers * walked + votes * looked + asked * sampled * dim
        return 2 * products, walked + looked + sampled * dim

    def bind(
        self, q: Tensor, keys: KeyRows, pyramid: object, scale: float, softcap: float | None
    ) -> TreeSearch:
        """q `[Hkv, G, rows, D]` and keys `[Hkv, T, D]` of one span; `pyramid` covers every block
        searched."""
        assert isinstance(pyramid, Pyramid)
        return TreeSearch(self.config, self.representative, q, keys, pyramid, scale, softcap)


@dataclass(frozen=True)
class TreeSearch(BoundSelectorByNeed):
    """The search bound to a span."""

    config: HiPConfig
    representative: Representative
    q: Tensor
    keys: KeyRows
    pyramid: Pyramid
    scale: float
    softcap: float | None
    positions: Positions | None = None  # chunk-indexed, where the context is extended

    @property
    def scarce(self) -> bool:
        """Whether a search may find fewer blocks than are scored again: it finds two for each chunk
        that it keeps."""
        return self.config.rescore_blocks > 2 * self.config.beam_blocks

    def chunk_indexed(self, positions: Positions) -> TreeSearch:
        """The search in which a chunk that is `n` chunks of its level before the window counts as
        `n` keys farther away."""
        return replace(self, positions=positions)

    def select(self, heads: slice, blocks: list[QueryBlock], near: Tensor | None = None) -> Tensor:
        """Sorted block indices `[heads, S, len(blocks), budget / block_k]`; `S` is 1 for a shared
        mask, else G.

        `near` `[heads, G, rows]`: log-sum-exp of each row of `blocks` over sink, window and own
        block; for votes by need."""
        parts, row = [], 0

        def alike(block: QueryBlock) -> tuple[int, int, int | None]:
            low, high = block.low, block.high
            if looked_at_whole(self.config, low, high):
                return block.rows, 0, None
            sampled = sample_level(self.config, low, high, most_sampled(self.config, low, high))
            return block.rows, sampled, start_level(self.config, low, high)

        for (rows, sampled, level), run in groupby(blocks, key=alike):
            some = list(run)
            own = None if near is None else near[:, :, row : row + len(some) * rows]
            votes = self._votes(heads, some, own, sampled, level is None)
            if level is None:
                parts.append(self._whole(heads, some, *votes[:2]))
            else:
                parts.append(self._search(heads, some, level, votes))
            row += len(some) * rows
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _search(self, heads: slice, blocks: list[QueryBlock], level: int, votes: Votes) -> Tensor:
        """The search of query blocks that start at one `level`."""
        config, device, (q, near, walking) = self.config, self.q.device, votes
        features = self.representative.features(q[:, :, :walking])
        near_walking = None if near is None else near[:, :, :walking]
        masks_per_kv_head, levels = q.shape[1] // len(blocks), range(level + 1)
        # Of every level: its first and its last complete chunk, and which of them the level above
        # covers, for they are halves of those there.
        ends = [[(_ceil_shift(b.low, n), (b.high >> n) - 1) for b in blocks] for n in levels]
        edges = torch.tensor(ends, device=device).repeat(1, masks_per_kv_head, 1)  # [levels, P, 2]
        halves = torch.arange(2, device=device)
        covered_edges = edges[:-1] == 2 * edges[1:] + halves

        # Start: every query block meets the same tile of chunks, so this level is one matrix
        # product.
        tile = slice(min(first for first, _ in ends[-1]), 1 + max(last for _, last in ends[-1]))
        ids = torch.arange(tile.start, tile.stop, device=device).expand(*q.shape[:2], -1)
        invalid = None
        if any(span != ends[-1][0] for span in ends[-1]):
            invalid = (ids[0] < edges[-1, :, :1]) | (ids[0] > edges[-1, :, 1:])
        if self.positions is None:
            table, flat = self.pyramid.levels[level][heads, tile], features.flatten(1, 2)
            logits, into = _room_for((*flat.shape[:2], table.shape[1]), near_walking, flat)
            torch.bmm(flat, table.transpose(1, 2), out=into)
            logits = logits.view(*features.shape[:3], -1)
            scores = self._aggregate(logits, invalid, near_walking, level)
        else:  # the window of each query block is elsewhere
            scores = self._scores(heads, level, features, ids, edges[-1], invalid, near_walking)

        for below in reversed(range(level)):
            # there are at least `beam_blocks`: a level below the start has more than twice as many
            ids = best(scores, ids, config.beam_blocks)
            children = (2 * ids[..., None] + halves).flatten(-2)
            own, invalid = edges[below], covered_edges[below]
            ids = torch.cat([children, own.expand(*ids.shape[:2], 2)], dim=-1)
            scores = self._scores(heads, below, features, ids, own, invalid, near_walking)
        if self.scarce:
            ids = ids.masked_fill(scores == -torch.inf, NO_CHUNK)

        if config.rescore_blocks:
            ids = best(scores, ids, config.rescore_blocks).sort(dim=-1).values
            windows = [block.high for block in blocks] * masks_per_kv_head
            scores = self._exact(heads, q, ids, windows, near)
            read_on(scores, ids, onward_of(config))
        ids = best(scores, ids, config.budget_blocks).sort(dim=-1).values
        return ids.unflatten(1, (masks_per_kv_head, len(blocks)))

    def _whole(
        self, heads: slice, blocks: list[QueryBlock], q: Tensor, near: Tensor | None
    ) -> Tensor:
        """As `_search`, of candidates that are looked at whole: their keys are read as they lie."""
        config, size, device = self.config, self.config.block_k, self.q.device
        first, end = min(block.low for block in blocks), max(block.high for block in blocks)
        ids = torch.arange(first, end, device=device)
        keys = self.keys[heads, first * size : end * size].to(q.dtype)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = torch.full((*q.shape[:2], end - first), -torch.inf, dtype=dtype, device=device)
        join = torch.maximum if config.score == "max" else torch.add
        for item in range(q.shape[1]):
            block = blocks[item % len(blocks)]
            some = slice(block.low - first, block.high - first)
            own = keys[:, some.start * size : some.stop * size]
            own = self._unrotated(own, ids[None, some], block.high)
            most = max(1, VOTES_AT_ONCE // (len(q) * own.shape[1]))
            for at in range(0, q.shape[2], most):
                votes = q[:, item, at : at + most]
                found = None if near is None else near[:, item, at : at + most]
                logits, into = _room_for((*votes.shape[:2], own.shape[1]), found, q)
                torch.bmm(votes, own.transpose(1, 2), out=into)
                part = aggregate(logits, config.score, self.softcap, None, found, size)
                before = scores[:, item, some]
                scores[:, item, some] = part if at == 0 else join(before, part)
        every = ids.expand(scores.shape)
        read_on(scores, every, onward_of(config))
        chosen = best(scores, every, config.budget_blocks)  # every query block has more
        return chosen.sort(dim=-1).values.unflatten(1, (-1, len(blocks)))

    def _gather(self, heads: slice, level: int, ids: Tensor, edges: Tensor) -> Tensor:
        """Summaries of the chunks `ids` `[heads, P, M]` -> `[heads, P, M, width]`; `edges`
        `[P, 2]`: the first and the last chunk of the searched range."""
        table = self.pyramid.levels[level][heads]
        out = scratch.take("summaries", (*ids.shape, table.shape[-1]), table)
        rows = ids
        if len(table) > 1:
            head = torch.arange(len(table), device=ids.device)[:, None, None]
            rows = torch.add(ids, head, alpha=table.shape[1])
        torch.index_select(table.flatten(0, 1), 0, rows.flatten(), out=out.flatten(0, 2))
        if self.positions is None:
            return out
        cos, sin = self._angles(ids, edges[:, 1], out)
        unrotated = scratch.take("unrotated", out.shape, out)
        return self.representative.unrotate(out, cos, sin, self.q.shape[-1], unrotated)

    def _angles(self, ids: Tensor, last: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[heads, P, M, R / 2]` by which chunks are rotated back: a position for
        each chunk up to the last one before the window, `last` `[P]`."""
        assert self.positions is not None
        farthest = farthest_chunk(self.positions, self.config)
        return self.positions.chunk_angles(ids, last, farthest, like)

    def _scores(
        self,
        heads: slice,
        level: int,
        features: Tensor,
        ids: Tensor,
        edges: Tensor,
        invalid: Tensor | None,
        near: Tensor | None,
    ) -> Tensor:
        """Scores `[heads, P, M]` of the chunks `ids` that each of P query blocks has for itself;
        features `[heads, P, R, F]`.

        `edges` as in `_gather`; `invalid`, `[P, m]`, masks the last of the chunks; `near` as
        `_votes` gives it.
        """
        table, (heads_here, count, rows, _) = self.pyramid.levels[level], features.shape
        logits, products = _room_for((heads_here, count, rows, ids.shape[-1]), near, features)
        size = max(1, GATHERED_AT_ONCE // (ids.shape[-1] * table.shape[-1] * table.itemsize))
        # all heads of a decode step's row at once, of which there is little; of more rows head by
        # head
        each = heads_here if count == 1 or heads_here * count <= size else 1
        for head in range(0, heads_here, each):
            some = slice(heads.start + head, heads.start + head + each)
            own = slice(head, head + each)
            for at in range(0, count, size):
                part = slice(at, at + size)
                summaries = self._gather(some, level, ids[own, part], edges[part]).flatten(0, 1)
                vectors, into = (x[own, part].flatten(0, 1) for x in (features, products))
                torch.bmm(vectors, summaries.transpose(1, 2), out=into)
        return self._aggregate(logits, invalid, near, level)

    def _aggregate(
        self, logits: Tensor, invalid: Tensor | None, near: Tensor | None, level: int
    ) -> Tensor:
        if near is not None:
            # a chunk's logit stands for each of its keys, so that `near` is divided by their number
            near = near - math.log(self.config.block_k << level)
        return aggregate(logits, self.config.score, self.softcap, invalid, near)

    def _exact(
        self, heads: slice, q: Tensor, ids: Tensor, windows: list[int], near: Tensor | None
    ) -> Tensor:
        """Scores of key blocks `ids` `[heads, P, M]` by all their keys; `windows`: of each of P
        query blocks the key block that its window begins with."""
        keys, size = self.keys[heads], self.config.block_k
        missing = ids == NO_CHUNK if self.scarce else None
        if missing is not None:
            ids = ids.masked_fill(missing, 0)
        head_rows, index = head_rows_of(keys, size), block_index(keys, ids, size)
        scores = q.new_empty(ids.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        count, dim = ids.shape[2], keys.shape[-1]
        units, each = index.shape[2] // count, len(ids) * size * dim * keys.dtype.itemsize
        most = min(count, max(1, GATHERED_AT_ONCE // each))
        picked = scratch.take("picked", (len(ids), most * units, head_rows[0].width), keys)
        shape = (len(ids), q.shape[2], count * size)
        for item in range(ids.shape[1]):
            own = None if near is None else near[:, item]
            logits, products = _room_for(shape, own, q)
            for at in range(0, count, most):
                end = min(at + most, count)
                flat = picked[:, : (end - at) * units]
                for head, rows in enumerate(head_rows):
                    rows.take(index[head, item, at * units : end * units], flat[head])
                flat = flat.reshape(len(ids), -1, dim).to(q.dtype)
                flat = self._unrotated(flat, ids[:, item, at:end], windows[item])
                into = products[:, :, at * size : end * size]
                torch.bmm(q[:, item], flat.transpose(1, 2), out=into)
            absent = None if missing is None else missing[:, item].repeat_interleave(size, -1)
            found = aggregate(logits, self.config.score, self.softcap, absent, own, size)
            scores[:, item] = found
        return scores

    def _unrotated(self, keys: Tensor, ids: Tensor, window: int) -> Tensor:
        """Keys `[heads, M * block_k, D]` of the blocks `ids` `[heads, M]`, as a query block sees
        them whose window begins with block `window`."""
        if self.positions is None:
            return keys
        last = torch.tensor([window - 1], device=ids.device)
        angles = self._angles(ids[:, None], last, keys)
        # a block's keys rotate alike
        cos, sin = (x[:, 0].repeat_interleave(self.config.block_k, 1) for x in angles)
        return rotate(keys, cos, sin, back=True, out=scratch.take("unrotated", keys.shape, keys))


# The settings of the paper.
PAPER: dict[str, str | int] = dict(vote="sampled", query_stride=4, representative="middle")
PAPER |= dict(score="max", beam=1, rescore=1, decode_refresh=8)

METHOD = base.Method(
    "the best key blocks, found by a tree search, O(log T) per query block",
    Selector,
    Options,
    presets={
        "defaults": {},
        "quality": {"query_stride": 1, "beam": 16, "rescore": 16, "decode_refresh": 1},
        "beam1": {"beam": 1, "rescore": 1},
        # every key between sink and window: what the estimate is measured by
        "true_need": {"options": {"sample": 1 << 28}},
        "paper": PAPER,
        "delta": {"delta": 64},
    },
)
