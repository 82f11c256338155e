"""Block-sparse attention, torch backend: exact attention of each query block over the keys it
reads.

One routine serves sparse prefill, decode and everything dense that PyTorch's own attention cannot
do (log-sum-exp, softcap, sinks, sliding windows, a few rows against a long cache): a dense block
merely reads one contiguous range.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from hip_hf.backends.tensors import Tensors, merge
from hip_hf.backends.torch.softmax import add_sink_logits, exponentiate, weigh_values
from hip_hf.cache.pages import KeyRows, PagedKeys, block_index, head_rows_of
from hip_hf.geometry import QueryBlock, rows_of_blocks
from hip_hf.methods.ranking import squash
from hip_hf.workers import LOGITS_AT_ONCE, compute_dtype, scratch, widened

# Bytes of logits that wait for a selection at most, in each worker, which keeps them, with room for
# those of what is selected: enough query blocks to amortise the operations of a search.
NEAR_AT_ONCE = 1 << 25
# Keys of a contiguous range that lie in several pieces are read where they lie if a piece has
# `KEYS_OF_A_PIECE` keys on average; shorter ones are brought together, `KEYS_AT_ONCE` at a time.
KEYS_OF_A_PIECE, KEYS_AT_ONCE = 512, 4096


def alike(block: QueryBlock) -> tuple[int, int, int, int]:
    """What query blocks have in common that `partial` serves together."""
    return block.start, block.sink_end, block.rows, block.first - block.window_start


def near_ranges(block: QueryBlock) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and end of the sink, and of the window up to the block's own last key, which a query
    block reads in any case."""
    return (block.start, block.sink_end), (block.window_start, block.last + 1)


def near_lengths(block: QueryBlock) -> tuple[int, int]:
    """Keys of the sink and of the window in `near_ranges`."""
    (start, sink_end), (window_start, end) = near_ranges(block)
    return sink_end - start, end - window_start


class BlockLogits:
    """Logits of query blocks that are `alike`, one query block after another, over a part of what
    they read: the key blocks `ids` `[heads, len(blocks), n]` (None: none), and, if `near`, sink and
    window, in this order.

    `reserved`: keys, selected later, that are read between sink and window where positions are
    given by the order of what is read. Each step is a handful of operations on buffers and views
    made once: the workers share the interpreter, and would wait for each other at every operation
    more.
    """

    def __init__(
        self,
        t: Tensors,
        blocks: list[QueryBlock],
        ids: Tensor | None,
        block_k: int,
        near: bool = True,
        reserved: int = 0,
    ) -> None:
        first, count, n = blocks[0], len(blocks), blocks[0].rows
        q = t.q[:, :, rows_of_blocks(blocks)]
        self.t, self.blocks, self.near = t, blocks, near
        self.kv_heads, self.groups, _, dim = q.shape
        self.rows, self.count = self.groups * n, count
        if ids is None:
            ids = torch.empty(self.kv_heads, count, 0, dtype=torch.long, device=q.device)
        (sink, window), picked = near_lengths(first), ids.shape[2] * block_k
        self.total = sink + picked + reserved + window
        self.places = [(sink, sink + picked)]
        if near:
            self.places += [(0, sink), (self.total - window, self.total)]
        else:
            sink = window = 0
        self.picked, self.keys = picked, sink + picked + window

        self.like = q.new_empty(0, dtype=compute_dtype(q))
        self.queries = scratch.take("q", (count, self.kv_heads, self.groups, n, dim), self.like)
        self.queries.copy_(q.unflatten(2, (count, n)).permute(2, 0, 1, 3, 4))
        self.queries.mul_(t.scale)  # widened before it is scaled
        if t.positions is not None:
            self.queries = t.positions.streaming(self.queries, self.total)
        self.chosen = [row.unbind(0) for row in block_index(t.k, ids, block_k).unbind(1)]
        self.part = Parts("k", t.k, blocks, (picked, sink, window), block_k)
        self.k = scratch.take("k", tuple(self.part.all.shape), self.like)
        self.unseen = future(n, q.device)
        self.at = None
        if t.sliding_window is not None:
            each = zip(blocks, ids.unbind(1), strict=True)
            self.at = [_positions(block, own, block_k, near) for block, own in each]

    def fill(self, i: int, logits: Tensor) -> None:
        """Logits `[heads, G * rows, keys]` of the `i`-th query block: capped, what a row may not
        see masked."""
        t, block, n = self.t, self.blocks[i], self.blocks[0].rows
        self.part.fill(i, self.chosen[i])
        if self.part.all.dtype != self.k.dtype:
            self.k.copy_(self.part.all)
        if t.positions is None:
            torch.bmm(self.queries[i].flatten(1, 2), self.k.transpose(1, 2), out=logits)
        else:
            places, total = self.places, self.total
            t.positions.streaming_logits(self.queries[i], self.k, places, total, out=logits)
        squash(logits, t.softcap)
        if n == 1 and self.at is None:
            return
        by_row = logits.unflatten(1, (self.groups, n))
        if n > 1 and self.near:
            by_row[..., self.keys - n :].masked_fill_(self.unseen, -torch.inf)
        if self.at is not None:
            assert t.sliding_window is not None
            _mask_sliding(by_row, self.at[i], block.first, t.sliding_window)

    def by_rows(self, x: Tensor) -> Tensor:
        """`[len(blocks), heads, G * rows, ...]` -> `[heads, G, len(blocks) * rows, ...]`."""
        return x.unflatten(2, (self.groups, -1)).transpose(0, 1).transpose(1, 2).flatten(2, 3)

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.promote_types(self.like.dtype, torch.float32)


def in_parts(t: Tensors, blocks: list[QueryBlock], reserved: int) -> list[slice]:
    """Parts of query blocks that are `alike` whose `near_logits` may wait together."""
    logits = t.q.shape[1] * blocks[0].rows * (reserved + sum(near_lengths(blocks[0])))
    size = max(1, NEAR_AT_ONCE // (logits * compute_dtype(t.q).itemsize))
    return [slice(at, at + size) for at in range(0, len(blocks), size)]


def near_logits(
    t: Tensors, blocks: list[QueryBlock], block_k: int, reserved: int, asked: range
) -> tuple[Tensor, Tensor]:
    """Logits `[len(blocks), heads, G * rows, reserved + sink + window]` of query blocks that are
    `alike` for what they always read, behind room for those of `reserved` selected keys, and
    the log-sum-exp `[heads, G, len(blocks) * rows]` of each block's rows that are `asked`, in fp32
    at least; NaN for the others."""
    of = BlockLogits(t, blocks, None, block_k, reserved=reserved)
    shape, by_group = (of.count, of.kv_heads, of.rows, reserved + of.keys), (of.groups, -1)
    logits = scratch.take("near", shape, of.like)
    lse = torch.full(shape[:3], torch.nan, dtype=of.lse_dtype, device=of.like.device)
    some = slice(asked.start, asked.stop, asked.step)
    wide = scratch.take("wide", (of.kv_heads, of.groups, len(asked), of.keys), lse)
    for i in range(of.count):
        own = logits[i, ..., reserved:]
        of.fill(i, own)
        wide.copy_(own.unflatten(1, by_group)[:, :, some])
        lse[i].unflatten(1, by_group)[:, :, some] = exponentiate(wide)[1]
    return logits, of.by_rows(lse)


def partial(
    t: Tensors,
    blocks: list[QueryBlock],
    ids: Tensor | None,
    block_k: int,
    need_lse: bool,
    near: bool = True,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of query blocks that are `alike` over a part of what they read: the key blocks
    `ids` `[heads, len(blocks), n]` (None: none), and, if `near`, sink and window. Output
    `[heads, G, rows, Dv]` and log-sum-exp `[heads, G, rows]` (without attention sinks), in the
    dtype that is multiplied in and fp32 at least. `known`: the logits of sink and window, as
    `near_logits` gives them; they are overwritten."""
    of = BlockLogits(t, blocks, ids, block_k, near=near and known is None)
    sink, window = near_lengths(blocks[0]) if near else (0, 0)
    values = Parts("v", t.v, blocks, (of.picked, sink, window), block_k)
    v_all = scratch.take("v", tuple(values.all.shape), of.like)
    outputs = scratch.take("out", (of.count, of.kv_heads, of.rows, t.v.shape[-1]), of.like)
    keys = of.picked + sink + window
    if known is None:  # one buffer for every query block
        room = scratch.take("logits", (1, of.kv_heads, of.rows, keys), of.like)
        known = room.expand(of.count, -1, -1, -1)
    lses: list[Tensor] = []
    for i in range(of.count):
        values.fill(i, of.chosen[i])
        if values.all.dtype != v_all.dtype:
            v_all.copy_(values.all)
        logits = known[i, ..., known.shape[-1] - keys :]
        if of.keys:
            of.fill(i, logits[..., : of.keys])
        lse = weigh_values(logits, v_all, outputs[i], need_lse)
        if lse is not None:
            lses.append(lse)
    return of.by_rows(outputs), of.by_rows(torch.stack(lses)) if need_lse else None


def attend_blocks(
    t: Tensors, blocks: list[QueryBlock], ids: Tensor, block_k: int, known: Tensor | None = None
) -> None:
    """Sparse attention of query blocks.

    `ids` `[heads, len(blocks), n]`: the sorted key blocks that each query block reads between sink
    and window. `known`: the logits of sink and window, of query blocks that are `alike`.
    """
    at = 0
    for _, same in groupby(blocks, key=alike):
        run = list(same)
        need_lse = t.lse is not None or t.sink_logits is not None
        some = ids[:, at : at + len(run)]
        known_some = None if known is None else known[at : at + len(run)]
        found = partial(t, run, some, block_k, need_lse, known=known_some)
        store(t, rows_of_blocks(run), *found)
        at += len(run)


class Parts:
    """A buffer `[heads, picked + sink + window, D]` for the keys (or values) that one query block
    reads, and views of it; `sizes`: `(picked, sink, window)`."""

    def __init__(
        self,
        name: str,
        x: KeyRows,
        blocks: list[QueryBlock],
        sizes: tuple[int, int, int],
        block_k: int,
    ) -> None:
        (heads, _, dim), (picked, sink, window), first = x.shape, sizes, blocks[0]
        self.all = scratch.take(name, (heads, sum(sizes), dim), x)
        # the same for every query block
        self.all[:, picked : picked + sink] = x[:, first.start : first.start + sink]
        self.head_rows = head_rows_of(x, block_k)
        into = [one[:picked] for one in self.all]
        self.picked = [
            part.view(part.numel() // rows.width, rows.width)
            for part, rows in zip(into, self.head_rows, strict=True)
        ]
        self.window = self.all[:, picked + sink :]
        self.windows = None
        if window:
            windows = x[:, first.window_start : blocks[-1].last + 1].unfold(1, window, first.rows)
            self.windows = windows.transpose(2, 3).unbind(1)

    def fill(self, i: int, chosen: tuple[Tensor, ...]) -> None:
        """Bring what the `i`-th query block reads: of each head the rows of its `chosen` key
        blocks, and the window."""
        for rows, index, into in zip(self.head_rows, chosen, self.picked, strict=True):
            if len(index):
                rows.take(index, into)
        if self.windows is not None:
            self.window.copy_(self.windows[i])


def attend_range(t: Tensors, block: QueryBlock) -> None:
    """Attention of one query block to every key from `block.start` on, read where it lies; tile by
    tile if they are many."""
    query = _scaled_queries(t, block)
    _, groups, n, _ = query.shape
    tile = max(n, LOGITS_AT_ONCE // (groups * n))
    parts: list[tuple[Tensor, Tensor | None]] = []
    end = block.last + 1
    cuts = [] if t.positions is None else t.positions.cuts(block.first, block.last)
    cuts = [*cuts, *(cut for cut in cuts_of(t.k, block.start, end) if cut <= end - n)]
    while end > block.start:  # from the last key down, so that the rows' own are whole in one tile
        first = max([block.start, end - tile, *(cut for cut in cuts if cut < end)])
        several = len(parts) > 0 or first > block.start
        parts.append(_attend_tile(t, query, block, first, end, merge=several))
        end = first
    out, lse = parts[0]
    for more, more_lse in parts[1:]:
        assert lse is not None
        assert more_lse is not None
        lse = merge(out, lse, more, more_lse)
    store(t, rows_of_blocks([block]), out, lse)


def near_lse(t: Tensors, block: QueryBlock) -> Tensor:
    """Log-sum-exp `[heads, G, 1]`, in fp32 at least, of a query block of one row over what it
    always reads, where it lies. Without context extension: there positions are given by the order
    of what is read."""
    query, (sink, window) = _scaled_queries(t, block), near_lengths(block)
    kv_heads, groups, _, _ = query.shape
    logits = scratch.take("logits", (kv_heads, groups, sink + window), query)
    parts = logits[..., :sink], logits[..., sink:]
    for (first, end), into in zip(near_ranges(block), parts, strict=True):
        _tile_logits(t, query, block, first, end, into)
    return exponentiate(widened(logits))[1][..., None]


def _scaled_queries(t: Tensors, block: QueryBlock) -> Tensor:
    """The scaled queries of a query block, `[heads, G, rows, D]`, in the dtype to multiply in."""
    q = t.q[:, :, rows_of_blocks([block])]
    like = q.new_empty(0, dtype=compute_dtype(q))
    return scratch.take("q", tuple(q.shape), like).copy_(q).mul_(t.scale)  # widened before scaled


def cuts_of(k: KeyRows, start: int, end: int) -> list[int]:
    """Where a read of the keys `start` to `end - 1` is cut: at the borders of its pieces in memory,
    which are read where they lie, or, if these are short, every `KEYS_AT_ONCE` keys, which are
    brought together."""
    borders = k.borders(start, end) if isinstance(k, PagedKeys) else []
    if borders and (end - start) // (len(borders) + 1) < KEYS_OF_A_PIECE:
        return list(range(start + KEYS_AT_ONCE, end, KEYS_AT_ONCE))
    return borders


def _attend_tile(
    t: Tensors, query: Tensor, block: QueryBlock, first: int, end: int, merge: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention to the keys `first` to `end - 1`, and the log-sum-exp if the caller or a `merge`
    with other tiles needs it."""
    kv_heads, groups, n, _ = query.shape
    v = t.v[:, first:end].to(query.dtype)
    logits = scratch.take("logits", (kv_heads, groups * n, end - first), query)
    _tile_logits(t, query, block, first, end, logits)
    out = scratch.take("out", (kv_heads, groups * n, v.shape[-1]), query)
    lse = weigh_values(logits, v, out, t.lse is not None or t.sink_logits is not None or merge)
    out = out.view(kv_heads, groups, n, -1)
    if lse is None:
        return out, None
    return (out.to(lse.dtype, copy=True) if merge else out), lse.view(kv_heads, groups, n)


def _tile_logits(
    t: Tensors, query: Tensor, block: QueryBlock, first: int, end: int, logits: Tensor
) -> None:
    """Logits `[heads, G * rows, end - first]` of a query block for the keys `first` to `end - 1`:
    capped, what a row may not see masked."""
    _, groups, n, _ = query.shape
    k = t.k[:, first:end].to(query.dtype)
    if t.positions is None:
        torch.bmm(query.flatten(1, 2), k.transpose(1, 2), out=logits)
    else:
        t.positions.dense_logits(query, k, block.first, block.last, first, out=logits)
    squash(logits, t.softcap)
    by_row = logits.unflatten(1, (groups, n))
    if n > 1 and end == block.last + 1:
        by_row[..., end - first - n :].masked_fill_(future(n, logits.device), -torch.inf)
    if t.sliding_window is not None:
        position = torch.arange(first, end, device=query.device)[None]
        _mask_sliding(by_row, position, block.first, t.sliding_window)


def store(t: Tensors, rows: slice, out: Tensor, lse: Tensor | None) -> None:
    """Write out `[heads, G, rows, Dv]` and log-sum-exp `[heads, G, rows]` of query rows; sinks are
    an extra logit, which scales the output by `sigmoid(lse - sink)`."""
    if t.sink_logits is not None:
        assert lse is not None
        add_sink_logits(out, lse, t.sink_logits)
    t.out[:, :, rows] = out
    if t.lse is not None:
        assert lse is not None
        t.lse[:, :, rows] = lse


_triangles: dict[tuple[int, torch.device], Tensor] = {}


def future(size: int, device: torch.device) -> Tensor:
    """`[size, size]`: where a row of a block may not see a later row's key. Whatever its logit is,
    also infinite or NaN: nothing that is added to it would hide that."""
    key = (size, device)
    if key not in _triangles:
        with torch.inference_mode(False):
            _triangles[key] = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    return _triangles[key]


def _positions(block: QueryBlock, ids: Tensor, block_k: int, near: bool) -> Tensor:
    """Positions `[heads, keys]` of the keys that `Parts.fill` brings."""
    selected = (ids[..., None] * block_k + torch.arange(block_k, device=ids.device)).flatten(1)
    if not near:
        return selected
    parts = [
        torch.arange(*some, device=ids.device).expand(len(ids), -1) for some in near_ranges(block)
    ]
    return torch.cat([selected, *parts], dim=1)


def _mask_sliding(logits: Tensor, position: Tensor, first: int, window: int) -> None:
    """Hide from each row the keys that have left its window; logits `[heads, G, rows, keys]`,
    position `[heads or 1, keys]`."""
    row = torch.arange(first, first + logits.shape[2], device=logits.device)[:, None]
    # finite, so that a row that sees nothing of a tile gets a log-sum-exp that counts for nothing,
    # and no NaN
    logits.masked_fill_((position[:, None] <= row - window)[:, None], torch.finfo(logits.dtype).min)
