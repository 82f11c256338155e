"""The sparse path, torch backend: per query block, select key blocks and attend to them."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from hip_hf.backends.base import BlockSparseCall, Piece, steps_of
from hip_hf.backends.tensors import Tensors, merge, tensors_of
from hip_hf.backends.torch import dense
from hip_hf.backends.torch.block_sparse import (
    alike,
    attend_blocks,
    attend_range,
    in_parts,
    near_logits,
    near_lse,
    partial,
    store,
)
from hip_hf.backends.torch.decode_buffer import DecodeBuffer, attend_next, buffer_of, new_keys
from hip_hf.cache.pages import PagedKeys
from hip_hf.geometry import QueryBlock, Span, rows_of_blocks
from hip_hf.methods.base import BoundSelector
from hip_hf.methods.need import BoundSelectorByNeed, asked_rows
from hip_hf.state import DecodeState, KeptSelection, RowState
from hip_hf.workers import compute_dtype, run

# Query blocks that are searched together: enough to amortise Python, few enough to stay in cache.
BLOCKS_AT_ONCE = 32
FEWEST_BLOCKS = 4
# Steps under one selection that what it reads has room for before it must grow.
STEPS_AT_FIRST = 64


def portions(heads: int, blocks: int, workers: int) -> list[tuple[int, slice]]:
    """Cuts `heads` times `blocks` query blocks into units of work, small at the end so that no
    worker waits long for another."""
    units = []
    for head in range(heads):
        at = 0
        while at < blocks:
            left = (heads - head) * blocks - at
            size = min(BLOCKS_AT_ONCE, max(FEWEST_BLOCKS, left // (4 * workers)), blocks - at)
            units.append((head, slice(at, at + size)))
            at += size
    return units


def together(blocks: list[QueryBlock]) -> list[QueryBlock]:
    """Rows that follow one another, those with the same sink and window in one query block: what
    they read but for the candidates."""
    joined = []
    always = lambda block: (block.start, block.sink_end, block.window_start)  # noqa: E731
    for _, group in groupby(blocks, key=always):
        same = list(group)
        joined.append(replace(same[0], last=same[-1].last))
    return joined


class SparseAttention(BlockSparseCall):
    """One call of the sparse path on any device, by PyTorch's operations."""

    def run(self, state: DecodeState | None) -> None:
        if state is not None:
            state.bind(self.config, self.problem.k)
        for i, span in enumerate(self.problem.spans):
            row = None
            if state is not None:
                row = state.row(span.batch, span.key_start, span.position, span.end)
            t = tensors_of(self.problem, span, self.out, self.lse)
            if self.decoding:
                self.windows[i] = self._decode(t, span, row)
            else:
                self._prefill(t, span, row)

    def _search(self, t: Tensors, row: RowState | None, blocks: list[QueryBlock]) -> BoundSelector:
        """The selection rule bound to the span, its pyramid extended to what the query blocks
        need."""
        pyramid = row.pyramid if row is not None else None
        keys = source = t.k
        if isinstance(t.k, PagedKeys):
            keys = t.k.for_search()
            if not self.selector.reads_pages:
                keys = source = keys[:, :]  # gathered: O(T) a selection
        # or the pages that it reads
        keys, source = cast(Tensor, keys), cast(Tensor, source)
        if pyramid is None:
            pyramid = self.selector.make_pyramid(compute_dtype(t.k))
        if pyramid is not None:
            needed = max([block.high for block in blocks if not self._covered(block)] or [0])
            pyramid = pyramid.writable(needed)
            pyramid.extend(source, needed)
        if row is not None:
            row.pyramid = pyramid
        positions = t.positions
        if positions is None:
            return self.selector.bind(t.q, keys, pyramid, t.scale, t.softcap)
        bound = self.selector.bind(positions.voting(t.q, blocks), keys, pyramid, t.scale, t.softcap)
        return bound.chunk_indexed(positions) if positions.chunk_indexed else bound

    # Prefill: units of (key head, a few query blocks), spread over the workers.

    def _prefill(self, t: Tensors, span: Span, row: RowState | None) -> None:
        blocks = self._blocks(span)
        tail = self.tail(span)
        search = self._search(t, row, blocks)
        if row is not None:
            row.selection = None
        sparse = [block for block in blocks if block.row < tail or self.mask is not None]
        parts = portions(t.k.shape[0], len(sparse), torch.get_num_threads())
        units = [(head, sparse[part]) for head, part in parts]
        run(lambda unit: self._unit(t, search, span, *unit), units, t.q.device)
        if self.config.dense_tail:
            dense.attend_rows(t, tail, span, self.pieces)

    def _unit(
        self, t: Tensors, search: BoundSelector, span: Span, head: int, blocks: list[QueryBlock]
    ) -> None:
        heads = slice(head, head + 1)
        t = t.part(heads)
        for covered, group in groupby(blocks, key=self._covered):
            run = list(group)
            if covered:
                self._attend(t, span, heads, run, None)
                continue
            if not self.selector.asks_need:
                self._attend(t, span, heads, run, search.select(heads, run))
                continue
            for _, same in groupby(run, key=alike):
                some = list(same)
                asked = asked_rows(self.config, some[0].rows)
                for part in in_parts(t, some, self.budget * self.config.block_k):
                    # sink and window first: they tell who needs a key outside of them
                    logits, near = self._near(t, some[part], asked)
                    ids = self._selected(search, heads, some[part], near)
                    self._attend(t, span, heads, some[part], ids, logits)

    def _covered(self, block: QueryBlock) -> bool:
        """Whether the budget covers all candidates of a query block: there is nothing to select."""
        return block.num_candidates <= self.budget

    def _near(self, t: Tensors, blocks: list[QueryBlock], asked: range) -> tuple[Tensor, Tensor]:
        """Logits of query blocks that are `alike` for what they always read, as `near_logits` gives
        them, and the log-sum-exp `[heads, G, rows]` of these and the attention sinks, which also
        take from what is left for the candidates, of each block's rows that are `asked`."""
        size = self.config.block_k
        logits, lse = near_logits(t, blocks, size, self.budget * size, asked)
        return logits, self._with_sinks(t, lse)

    def _with_sinks(self, t: Tensors, lse: Tensor) -> Tensor:
        """The log-sum-exp `[heads, G, rows]` with the attention sinks, if there are any."""
        if t.sink_logits is None:
            return lse
        return torch.logaddexp(lse, t.sink_logits[:, :, None].to(lse.dtype))

    def _near_one(self, t: Tensors, block: QueryBlock) -> Tensor:
        """The log-sum-exp `[heads, G, 1]` of a single row over what it always reads."""
        if t.positions is None:
            return self._with_sinks(t, near_lse(t, block))
        return self._near(t, [block], range(1))[1]

    def _attend(
        self,
        t: Tensors,
        span: Span,
        heads: slice,
        blocks: list[QueryBlock],
        ids: Tensor | None,
        known: Tensor | None = None,
    ) -> None:
        """Attend to what was selected, `ids` `[heads, S, len(blocks), n]`, or (None) to all
        candidates. `t` has the key heads `heads` alone; `known`: logits as `_near` gives them."""
        size = self.config.block_k
        if ids is None:
            for block in blocks:
                attend_range(t, block)
        elif ids.shape[1] == 1:
            attend_blocks(t, blocks, ids[:, 0], size, known)
        else:
            each = [None] * ids.shape[1] if known is None else known.chunk(ids.shape[1], dim=2)
            for group, own in enumerate(each):
                part = t.part(slice(None), slice(group, group + 1))
                attend_blocks(part, blocks, ids[:, group], size, own)
        self._take_note(span, heads, blocks, ids)

    def _take_note(
        self, span: Span, heads: slice, blocks: list[QueryBlock], ids: Tensor | None
    ) -> None:
        """Put down what was read, for gradients and for the mask."""
        if self.pieces is not None:
            size, tail = self.config.block_k, self.tail(span)
            self.pieces.append(Piece(span, heads, blocks, ids, size, tail))
        if self.mask is not None:
            for i, block in enumerate(blocks):
                self._note(span, heads, block, None if ids is None else ids[:, :, i])

    # Decode: all heads of a row at once; a selection serves `decode_refresh` steps.

    def _decode(self, t: Tensors, span: Span, row: RowState | None) -> int | None:
        """Attend from a few rows; of a single one, where the window of its selection starts."""
        if span.rows > 1:
            self._decode_rows(t, span, row)
            return None
        heads = slice(0, t.k.shape[0])
        kept = row.selection if row is not None else None
        steps = steps_of(self.config)
        if kept is not None and span.position - kept.position < steps:
            (block,) = self._blocks(span, kept.window_start)
            if kept.stages and row is not None:
                kept = row.selection = self._stages(t, span, row, block, kept)
            ids = kept.ids
        elif isinstance(self.config.decode_refresh, list) and row is not None:
            (block,) = self._blocks(span)
            row.selection = self._stages(t, span, row, block, None)
            ids = row.selection.ids
        else:
            (block,) = self._blocks(span)
            search, ids = self._search(t, row, [block]), None
            if not self._covered(block):
                near = self._near_one(t, block) if self.selector.asks_need else None
                ids = self._selected(search, heads, [block], near)
            if row is not None:
                row.selection = KeptSelection(ids, block.window_start, block.first)
        if row is not None and self._uses_decode_buffer(t, row, block, steps):
            self._attend_decode_buffer(t, span, row, block, steps)
            self._take_note(span, heads, [block], ids)
        else:
            self._attend(t, span, heads, [block], ids)
        return block.window_start

    def _decode_rows(self, t: Tensors, span: Span, row: RowState | None) -> None:
        """A few rows at once: each selects for itself, and as little as possible is done row by
        row."""
        heads, blocks, ids = slice(0, t.k.shape[0]), self._blocks(span), None
        search = self._search(t, row, blocks)
        for covered, group in groupby(blocks, key=self._covered):
            some, ids = list(group), None
            if not covered:
                ids = self._attend_each(t, search, span, heads, some)
                continue
            for block in together(some):
                attend_range(t, block)
            self._take_note(span, heads, some, None)
        if row is not None:
            last, latest = blocks[-1], None if ids is None else ids[:, :, -1:]
            row.selection = KeptSelection(latest, last.window_start, last.first)

    def _attend_each(
        self, t: Tensors, search: BoundSelector, span: Span, heads: slice, blocks: list[QueryBlock]
    ) -> Tensor:
        """Attention of rows that each select for themselves, and what they select."""
        # each row's sink and window are those of its neighbours, but for the neighbours' own keys
        size = self.config.block_k
        outs, lses, nears = [], [], []
        for block in together(blocks):
            logits, near = self._near(t, [block], range(block.rows))
            nears.append(near)
            if self.pieces is not None:
                continue
            out, lse = partial(t, [block], None, size, True, known=logits)
            assert lse is not None
            outs.append(out.to(lse.dtype, copy=True))
            lses.append(lse)
        ids = self._selected(search, heads, blocks, torch.cat(nears, dim=2))
        if self.pieces is not None:
            # gradients are differences with the output, and would feel that half precision rounds
            # both parts of it
            self._attend(t, span, heads, blocks, ids)
            return ids
        out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
        # where positions are given by the order of what is read, each row has another one
        runs = [blocks] if t.positions is None else [[block] for block in blocks]
        for at, some in enumerate(runs if ids.shape[3] else []):
            rows = slice(at, at + len(some))
            for mask in range(ids.shape[1]):
                group = slice(None) if ids.shape[1] == 1 else slice(mask, mask + 1)
                part = t.part(slice(None), group)
                more, more_lse = partial(part, some, ids[:, mask, rows], size, True, near=False)
                assert more_lse is not None
                at_once = out[:, group, rows], lse[:, group, rows]
                lse[:, group, rows] = merge(*at_once, more.to(lse.dtype), more_lse)
        store(t, rows_of_blocks(blocks), out, lse)
        self._take_note(span, heads, blocks, ids)
        return ids

    def _selected(
        self, search: BoundSelector, heads: slice, blocks: list[QueryBlock], near: Tensor | None
    ) -> Tensor:
        """What query blocks select, `[heads, S, len(blocks), n]`; `near`: as `_near` gives it."""
        if self.selector.asks_need:
            return cast(BoundSelectorByNeed, search).select(heads, blocks, near)
        return search.select(heads, blocks)

    def _uses_decode_buffer(self, t: Tensors, row: RowState, block: QueryBlock, steps: int) -> bool:
        """Whether what a selection reads is kept side by side for the steps that it serves. Not
        where it changes each step (a sliding window), where heads of a group read keys of their
        own, where device pools of a cache do the same, and for a copy of a sequence that has none
        yet: until it selects for itself, it may soon be dropped again (beams)."""
        kept = row.selection
        return (
            steps > 1
            and kept is not None
            and (row.decode_buffer is not None or kept.position == block.last)
            and kept.ids is not None
            and kept.ids.shape[1] == 1
            and t.sliding_window is None
            and self.pieces is None
            and (not isinstance(t.k, PagedKeys) or t.k.store.resident)
            and (t.positions is None or self._room(steps) <= t.positions.trained)
        )

    def _room(self, steps: int) -> int:
        """Most keys that a step reads under a selection that serves `steps` steps."""
        config, size = self.config, self.config.block_k
        return config.sink_end + self.budget * size + config.window + size + steps

    def _attend_decode_buffer(
        self, t: Tensors, span: Span, row: RowState, block: QueryBlock, steps: int
    ) -> None:
        """Attend to what is kept side by side, which is brought there first where it is not."""
        kept = row.selection
        assert kept is not None
        buffer = buffer_of(row)
        if buffer is None:
            row.decode_buffer = buffer = DecodeBuffer(self._room(min(steps, STEPS_AT_FIRST)), t)
        if not buffer.holds(kept, block.last):
            refresh, until = self.config.decode_refresh, kept.position + steps
            if isinstance(refresh, list):
                ends = [at + each for (_, at), each in zip(kept.stages, refresh, strict=True)]
                until = min([until, *ends])
            buffer.fill(t, kept, block, self.config.block_k, until)
        at = slice(span.row_start, span.row_end)
        step = replace(self.problem, q=self.problem.q[:, :, at], spans=(span,))
        lse = None if self.lse is None else self.lse[:, :, at]
        attend_next(step, [row], new_keys(step), self.out[:, :, at], lse)

    def _stages(
        self, t: Tensors, span: Span, row: RowState, block: QueryBlock, kept: KeptSelection | None
    ) -> KeptSelection:
        """Select for one step, stage by stage: each has its own interval, and goes on from what the
        ones before it kept."""
        if self._covered(block):
            return KeptSelection(None, block.window_start, span.position)
        intervals = self.config.decode_refresh
        assert isinstance(intervals, list)
        known = [] if kept is None else list(zip(kept.stages, intervals, strict=True))
        valid = [stage for stage, steps in known if span.position - stage[1] < steps]
        if kept is not None and len(valid) == len(known):
            return kept
        if self.problem.sliding_window is not None:
            valid = []  # the first candidate has moved
        search = self._search(t, row, [block])
        results = search.resume(slice(0, t.k.shape[0]), [block], [ids for ids, _ in valid])
        stages = [*valid, *((ids, span.position) for ids in results[len(valid) :])]
        return KeptSelection(results[-1], block.window_start, stages[0][1], tuple(stages))

    def _note(self, span: Span, heads: slice, block: QueryBlock, ids: Tensor | None) -> None:
        assert self.mask is not None
        size = 1 if self.decoding else self.config.block_q
        at = block.first // size - span.position // size
        if ids is None:
            ids = torch.arange(block.low, block.high, device=self.out.device)
            ids = ids.expand(heads.stop - heads.start, 1, -1)
        masks_per_kv_head = 1 if self.config.group_shared else self.problem.groups
        ids = ids.expand(-1, masks_per_kv_head, -1).flatten(0, 1)
        into = slice(heads.start * masks_per_kv_head, heads.stop * masks_per_kv_head)
        self.mask.indices[span.batch, into, at, : ids.shape[1]] = ids.int()
        self.mask.counts[span.batch, into, at] = ids.shape[1]
