"""Calls of the selection kernel, held to the torch search on the same pyramid."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from helpers import make_qkv
from interpreter import DEVICE

from hip_hf.backends.triton.common.arguments import Logits
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.selection.search import SelectionBuffers, select
from hip_hf.backends.triton.selection.votes import select_votes
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span, query_blocks
from hip_hf.methods import need
from hip_hf.methods.base import selector_for
from hip_hf.methods.hip import TreeSearch
from hip_hf.methods.pyramid import Pyramid
from hip_hf.rope import Positions


def flat(pyramid: Pyramid, rows: int) -> torch.Tensor:
    """The pyramid in the kernels' layout: chunk `i` of level `l` is row `((2 * i + 1) << l) - 1`;
    other rows hold NaN."""
    heads, _, width = pyramid.levels[0].shape
    table = torch.full((heads, rows, width), torch.nan, dtype=pyramid.dtype)
    for level, chunks in enumerate(pyramid.levels):
        for i in range(pyramid.count(level)):
            table[:, ((2 * i + 1) << level) - 1] = chunks[:, i]
    return table


def paged(x: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, H, T, D]` cut into pages `[pages, page_size, H, D]` in random order, unused ones NaN,
    and their block table."""
    batch, heads, tokens, dim = x.shape
    per_row = -(-tokens // page_size)
    order = torch.randperm(batch * per_row + 3)
    pages = torch.full((len(order), page_size, heads, dim), torch.nan, dtype=x.dtype)
    table = order[: batch * per_row].view(batch, per_row).to(torch.int32)
    for b in range(batch):
        for i in range(per_row):
            part = x[b, :, i * page_size : (i + 1) * page_size]
            pages[table[b, i], : part.shape[1]] = part.transpose(0, 1)
    return pages, table


class Case:
    """One call: tensors, spans and settings; what the torch search selects, and what the kernel
    does."""

    def __init__(
        self, config: HiPConfig, spans: list[Span], page_size: int = 0,
        softcap: float | None = None, sliding: int | None = None, sinks: torch.Tensor | None = None,
        positions: Positions | None = None, **shape: Any,
    ) -> None:  # fmt: skip
        tokens = max(span.key_end for span in spans)
        rows = max(span.row_end for span in spans)
        self.q, self.k, self.v = make_qkv(
            tokens, rows, 1 + max(span.batch for span in spans), **{"heads": 1, **shape}
        )
        self.config, self.spans, self.page_size = config, spans, page_size
        self.softcap, self.sliding, self.sinks, self.scale = (
            softcap,
            sliding,
            sinks,
            self.q.shape[-1] ** -0.5,
        )
        self.positions = positions
        self.heads = self.k.shape[1]
        self.groups = self.q.shape[1] // self.heads
        self.selector = selector_for(config)

    @property
    def half(self) -> bool:
        return self.q.dtype in (torch.float16, torch.bfloat16)

    def keys(self, span: Span) -> torch.Tensor:
        return self.k[span.batch, :, span.key_start : span.key_end]

    def pyramid(self, span: Span) -> Pyramid:
        pyramid = self.selector.make_pyramid(self.k.dtype)
        pyramid.extend(self.keys(span), span.keys // self.config.block_k)
        return pyramid

    def blocks(self, span: Span, per_row: bool) -> list[QueryBlock]:
        relative = Span(span.batch, 0, span.keys, 0, span.rows, span.position)
        return query_blocks(self.config, relative, per_row, self.sliding)

    def search(self, span: Span) -> TreeSearch:
        """The torch search over a sequence. In half precision it computes in float64 with what the
        kernel has, summaries and votes (`voting`) that were rounded to half precision: nothing but
        the rounding of fp32 sums is left to decide otherwise.
        """
        q, keys = self.q[span.batch].unflatten(0, (self.heads, self.groups)), self.keys(span)
        pyramid = self.pyramid(span)
        if self.half:
            pyramid.levels, pyramid.dtype = (
                [level.double() for level in pyramid.levels],
                torch.float64,
            )
            q, keys = q.double(), keys.double()
        return self.selector.bind(
            q[:, :, span.row_start : span.row_end], keys, pyramid, self.scale, self.softcap
        )

    def near(
        self, span: Span, block: QueryBlock, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Log-sum-exp `[heads, G, rows]` of a query block's rows over what they always read,
        computed in `dtype`."""
        row = span.row_start + block.row
        q = (
            self.q[span.batch, :, row : row + block.rows]
            .unflatten(0, (self.heads, self.groups))
            .to(dtype)
        )
        keys, sinks = self.keys(span).to(dtype), self.sinks
        logits = q @ keys[:, None].transpose(-1, -2) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        key, position = (
            torch.arange(keys.shape[1]),
            torch.arange(block.first, block.last + 1)[:, None],
        )
        seen = (key <= position) & ((key < block.sink_end) | (key >= block.window_start))
        if self.sliding is not None:
            seen &= key > position - self.sliding
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype).view(self.heads, self.groups, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], dim=-1)
        return logits.logsumexp(-1)

    def voted(self, s: int) -> tuple[torch.Tensor, torch.Tensor, Voting]:
        """The kernels' votes of sequence `s`, `[heads, S, slots of all query blocks, D]`, and what
        each of them finds near."""
        q, _, kv, sequences = self.arguments()
        block_q = self.config.block_q
        votes, near = select_votes(q, kv, sequences, self.config, self.logits(), block_q)
        voting = Voting.of(self.config, self.groups, block_q, False)
        assert voting.ranked
        return (
            votes[s].cpu().unflatten(0, (self.heads, -1)),
            near[s].cpu().unflatten(0, (self.heads, -1)),
            voting,
        )

    def voting(self, s: int, per_row: bool) -> AbstractContextManager[Any]:
        """In it the torch search over sequence `s`, if in half precision, has the kernels' votes
        (`votes.py`) for its own."""
        config, laid = self.config, self.blocks(self.spans[s], per_row)
        if (
            not self.half
            or per_row
            or not Voting.of(config, self.groups, config.block_q, False).ranked
        ):
            return nullcontext()
        votes, found, voting = self.voted(s)

        def chosen(
            search: TreeSearch,
            heads: slice,
            blocks: list[QueryBlock],
            near: Any,
            level: int,
            whole: bool,
        ) -> tuple[torch.Tensor, torch.Tensor, int]:
            (n,) = (laid.index(block) for block in blocks)
            count = need.votes_of(config, laid[n].rows, voting.members, whole)
            own = slice(n * voting.slots, n * voting.slots + count)
            walking = (
                voting.walkers
                if count < voting.members * len(need.asked_rows(config, laid[n].rows))
                else count
            )
            return (
                search.scale * votes[heads, :, own].double(),
                found[heads, :, own].double(),
                walking,
            )

        return patch.object(TreeSearch, "_votes", chosen)

    def expected(self, per_row: bool) -> dict[tuple[int, int, int], list[int]]:
        """Selected blocks by (sequence, mask head, query block)."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for s in range(len(self.spans)):
            with self.voting(s, per_row):
                found |= self._expected(s, per_row)
        return found

    def _expected(self, s: int, per_row: bool) -> dict[tuple[int, int, int], list[int]]:
        found = {}
        span = self.spans[s]
        bound = self.search(span)
        for n, block in enumerate(self.blocks(span, per_row)):
            if block.num_candidates > self.selector.budget:
                near = (
                    self.near(span, block).to(bound.pyramid.dtype)
                    if self.config.vote == "need"
                    else None
                )
                ids = bound.select(slice(0, self.heads), [block], near)[:, :, 0].flatten(0, 1)
            else:
                masks = self.heads * (1 if self.config.group_shared else self.groups)
                ids = torch.arange(block.low, block.high).expand(masks, -1)
            found |= {(s, head, n): row.tolist() for head, row in enumerate(ids)}
        return found

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, KeyValues, Sequences]:
        most = max(2 * (span.keys // self.config.block_k) for span in self.spans)
        table = torch.stack([flat(self.pyramid(span), most) for span in self.spans]).to(DEVICE)
        if self.page_size:
            pages, block_table = paged(self.k, self.page_size)
            kv = KeyValues(pages.to(DEVICE), pages.to(DEVICE), block_table.to(DEVICE))
        else:
            kv = KeyValues(self.k.to(DEVICE), self.v.to(DEVICE))
        return self.q.to(DEVICE), table, kv, Sequences.of(self.spans, torch.device(DEVICE))

    def logits(self) -> Logits:
        sinks = None if self.sinks is None else self.sinks.to(DEVICE)
        return Logits(self.scale, self.softcap, self.sliding, sinks, self.positions)

    def empty(self, block_q: int, keep: bool = False) -> SelectionBuffers:
        sequences = Sequences.of(self.spans, torch.device(DEVICE))
        masks = self.heads * (1 if self.config.group_shared else self.groups)
        shape = (len(self.spans), masks, sequences.blocks(block_q))
        into = SelectionBuffers.empty(self.config, shape, torch.device(DEVICE), keep)
        for tensor in (into.indices, into.counts, into.window_start):
            tensor.fill_(-7)
        return into

    def run(self, block_q: int, into: SelectionBuffers | None = None) -> SelectionBuffers:
        into = self.empty(block_q) if into is None else into
        select(*self.arguments(), self.config, self.logits(), block_q, into)
        return into

    def check(self, per_row: bool = False, keep: bool = False) -> None:
        block_q = 1 if per_row else self.config.block_q
        got, want = self.run(block_q, self.empty(block_q, keep)), self.expected(per_row)
        counts, indices, window = got.counts.cpu(), got.indices.cpu(), got.window_start.cpu()
        wrong = {}
        for (s, head, n), blocks in want.items():
            count = int(counts[s, head, n])
            chosen = indices[s, head, n].tolist()
            if chosen[:count] != blocks or any(chosen[count:]):
                wrong[s, head, n] = (chosen[:count], blocks)
            laid = self.blocks(self.spans[s], per_row)[n]
            assert max(int(window[s, head, n]), laid.start) == laid.window_start
        assert not wrong, f"(sequence, head, query block): (got, want) {wrong}"
        assert int((counts > 0).sum()) == sum(bool(blocks) for blocks in want.values()), (
            "query blocks that do not exist are empty"
        )
        assert any(
            block.num_candidates > self.selector.budget
            for span in self.spans
            for block in self.blocks(span, per_row)
        )


def whole(tokens: int, rows: int, batch: int = 0, key_start: int = 0) -> Span:
    """A sequence of `tokens` keys, its last `rows` being queries."""
    return Span(batch, key_start, key_start + tokens, 0, rows, tokens - rows)
