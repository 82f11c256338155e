"""HyperAttention, torch backend: exact leaves, then the squares level by level, merged by
log-sum-exp.

Own block and sample of a block of rows stand side by side in one buffer and meet in one softmax.
Large temporaries are the workers' buffers; what grows with T are the results, the hashes and the
orders of one level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.backends.hyper import HyperCall
from hip_hf.backends.tensors import Tensors, merge, tensors_of
from hip_hf.backends.torch import dense
from hip_hf.backends.torch.dense_rows import attend_exact, rows_at_once
from hip_hf.backends.torch.softmax import add_sink_logits, weigh_wide
from hip_hf.geometry import Span
from hip_hf.methods.hyper import (
    Leaf,
    Square,
    Tiling,
    hashes,
    projections,
    sampled_ranks,
    split,
    tile_square,
)
from hip_hf.methods.ranking import squash
from hip_hf.workers import compute_dtype, run, scratch

if TYPE_CHECKING:
    from hip_hf.state import DecodeState

# Query blocks that one worker takes at a time, and how many of them meet their keys in one product.
BLOCKS_AT_ONCE = 32
BLOCKS_IN_PRODUCT = 2


@dataclass(frozen=True)
class Orders:
    """A square's rows and keys by hash: positions `[Hkv, G, rows]` and `[Hkv, keys]`, and the ranks
    of the sampled keys `[samples]`."""

    square: Square
    tiling: Tiling
    rows: Tensor
    keys: Tensor
    samples: Tensor


class HyperAttention(HyperCall):
    """One call on any device, by PyTorch's operations."""

    def run(self, state: DecodeState | None) -> None:
        self.note(state)
        for span in self.problem.spans:
            t = tensors_of(self.problem, span, self.out, self.lse)
            # of a cache in pages gathered: keys are sorted, and read in that order, all of them
            t = replace(t, k=t.k[:, :], v=t.v[:, :])
            self._span(t, span)
            tail = self.tail(span)
            if tail < span.rows:
                dense.attend_rows(t, tail, span)

    def _span(self, t: Tensors, span: Span) -> None:
        dtype = torch.promote_types(t.q.dtype, torch.float32)
        shape = (*t.q.shape[:3], t.v.shape[-1])
        out = t.out if t.out.dtype == dtype else torch.zeros(shape, dtype=dtype, device=t.q.device)
        lse = t.lse if t.lse is not None else torch.zeros(shape[:3], dtype=dtype, device=t.q.device)
        parts = replace(t, out=out, lse=lse, sink_logits=None)
        leaves, levels = split(span.position, span.end, self.options.min_seq_len)
        run(lambda task: attend_leaf(parts, span, *task), leaf_tasks(parts, leaves), t.q.device)
        if levels:
            assert isinstance(t.k, Tensor)
            directions = projections(self.options, t.q.shape[-1], self.config.seed, t.q.device)
            codes = hashes(t.q, directions), hashes(t.k, directions)
        for level in levels:
            tasks = square_tasks(parts, [self._order(square, codes, span) for square in level])
            run(lambda task: attend_square(parts, span, *task), tasks, t.q.device)
        if t.sink_logits is not None:
            add_sink_logits(out, lse, t.sink_logits)
        if out is not t.out:
            t.out.copy_(out)

    def _order(self, square: Square, codes: tuple[Tensor, Tensor], span: Span) -> Orders:
        rows, keys = codes
        rows = rows[..., square.first - span.position : square.end - span.position]
        keys = keys[..., square.key_first : square.key_end]
        tiling = tile_square(square, self.options, keys.device)
        samples = sampled_ranks(square, tiling.samples, self.config.seed, keys.device)
        rows, keys = (x.argsort(dim=-1, stable=True) for x in (rows, keys))
        return Orders(square, tiling, rows + square.first, keys + square.key_first, samples)


def leaf_tasks(t: Tensors, leaves: list[Leaf]) -> list[tuple[int, int, int, int]]:
    """Arguments of `attend_leaf`: a key head, and where some of a leaf's rows begin and end, and
    its keys begin."""
    rows = rows_at_once(t.q.shape[1])
    return [
        (head, first, min(first + rows, leaf.end), leaf.start)
        for leaf in leaves
        for first in range(leaf.first, leaf.end, rows)
        for head in range(t.q.shape[0])
    ]


def attend_leaf(t: Tensors, span: Span, head: int, first: int, end: int, start: int) -> None:
    """Exact attention of the rows at positions `first` to `end - 1` to the keys from `start` on,
    into `out` and `lse`."""
    assert t.lse is not None
    rows = slice(first - span.position, end - span.position)
    found = attend_exact(t, head, rows, range(first, end), start)
    t.out[head, :, rows], t.lse[head, :, rows] = found


def square_tasks(t: Tensors, orders: list[Orders]) -> list[tuple[Orders, int, int, int]]:
    """Arguments of `attend_square`: a square, a key head, one of its query heads, and the first of
    some query blocks."""
    heads, groups = t.q.shape[:2]
    return [
        (order, head, group, at)
        for order in orders
        for head in range(heads)
        for group in range(groups)
        for at in range(0, len(order.tiling.starts), BLOCKS_AT_ONCE)
    ]


def attend_square(t: Tensors, span: Span, order: Orders, head: int, group: int, at: int) -> None:
    """Attend from some query blocks of a square to their own blocks and to the sample, and merge
    that into `out` and `lse`."""
    assert t.lse is not None
    tiling, ranks, device = order.tiling, order.samples, t.q.device
    starts = tiling.starts[at : at + BLOCKS_AT_ONCE, None]
    some = slice(at * tiling.rows, (at + len(starts)) * tiling.rows)
    rows = order.rows[head, group, some] - span.position
    own = order.keys[head, starts + torch.arange(tiling.size, device=device)]  # [blocks, size]
    keys = torch.cat([own, order.keys[head, ranks].expand(len(own), -1)], dim=1)
    counted = (ranks >= starts) & (ranks < starts + tiling.size)
    bias = torch.zeros(counted.shape, dtype=compute_dtype(t.q), device=device)
    if tiling.samples:
        bias.add_(math.log(order.square.keys / tiling.samples)).masked_fill_(counted, -torch.inf)

    whole, rest = divmod(len(rows), tiling.rows)
    firsts = range(0, whole, BLOCKS_IN_PRODUCT)
    cuts = [(i, min(BLOCKS_IN_PRODUCT, whole - i), tiling.rows) for i in firsts]
    if rest:
        cuts.append((whole, 1, rest))
    out, lse = t.out[head, group], t.lse[head, group]
    for first, count, each in cuts:
        where = rows[first * tiling.rows :][: count * each]
        blocks = slice(first, first + count)
        found = _attend_own(t, head, group, where.view(count, each), keys[blocks], bias[blocks])
        merged = out[where]
        lse[where] = merge(merged, lse[where], *found)
        out[where] = merged


def _attend_own(
    t: Tensors, head: int, group: int, rows: Tensor, index: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Output `[blocks * rows, Dv]` and log-sum-exp of the rows `rows` `[blocks, rows]` over the
    keys `index` `[blocks, n]`; to the logits of the last of these `bias` `[blocks, S]` is added."""
    assert isinstance(t.k, Tensor)
    assert isinstance(t.v, Tensor)
    query = _bring("q", t.q[head, group], rows, bias.dtype).mul_(t.scale)
    k, v = (_bring(name, x[head], index, bias.dtype) for name, x in (("k", t.k), ("v", t.v)))
    logits = scratch.take("logits", (*rows.shape, index.shape[1]), query)
    torch.bmm(query, k.transpose(1, 2), out=logits)
    squash(logits, t.softcap)
    logits[..., index.shape[1] - bias.shape[1] :].add_(bias[:, None])
    out, lse = weigh_wide(logits, v)
    return out.flatten(0, 1), lse.flatten()


def _bring(name: str, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows `index` `[blocks, n]` of `x` `[rows, D]` as a buffer `[blocks, n, D]` in `dtype`."""
    raw = scratch.take(name, (*index.shape, x.shape[-1]), x)
    torch.index_select(x, 0, index.reshape(-1), out=raw.flatten(0, 1))
    if raw.dtype == dtype:
        return raw
    return scratch.take(name, tuple(raw.shape), raw.new_empty(0, dtype=dtype)).copy_(raw)
