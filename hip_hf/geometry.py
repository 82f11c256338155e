"""Where the keys and query rows of a call sit: sequences, query blocks and the mask of selected key
blocks. Integers only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hip_hf.config import HiPConfig

# A call with at most this many query rows is a decode step: every row selects for itself.
DECODE_ROWS = 16


@dataclass(frozen=True)
class Span:
    """One real sequence inside a batch row: its keys, its query rows, and where they sit.

    Padding, packing and unfilled cache slots are all said by spans; whatever lies outside every
    span is never read and its output is zero. `key_start`, `key_end`, `row_start` and `row_end` are
    places in the call's tensors; `position` and `end` count from the span's first key, which is
    token 0. So the keys in sight lie at `key_start` to `key_start + end - 1`.
    """

    batch: int
    key_start: int
    key_end: int
    row_start: int
    row_end: int
    position: int  # of query row `row_start`

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.key_end - self.key_start

    @property
    def rows(self) -> int:
        """Return the number of query rows."""
        return self.row_end - self.row_start

    @property
    def end(self) -> int:
        """One past the position of the last query row; keys from here on are in nobody's sight."""
        return self.position + self.rows

    def part(self, first: int, end: int) -> Span:
        """The span with its query rows at positions `first` to `end - 1` only."""
        row = self.row_start + first - self.position
        return Span(self.batch, self.key_start, self.key_end, row, row + end - first, first)


@dataclass(frozen=True)
class QueryBlock:
    """Query rows that share a selection, and what they always read. Everything is relative to the
    span.

    The rows sit at positions `first` to `last`. They read the sink `[start, sink_end)`, the window
    `[window_start, last]`, and of the *candidates*, the key blocks `low` to `high - 1` between the
    two, those that are selected.
    """

    row: int
    first: int
    last: int
    start: int
    sink_end: int
    low: int
    high: int
    window_start: int

    @property
    def rows(self) -> int:
        """Return the number of query rows."""
        return self.last - self.first + 1

    @property
    def num_candidates(self) -> int:
        """Key blocks between sink and window."""
        return self.high - self.low


def rows_of_blocks(blocks: Sequence[QueryBlock]) -> slice:
    """The query rows of query blocks that follow one another."""
    return slice(blocks[0].row, blocks[-1].row + blocks[-1].rows)


def make_query_block(
    config: HiPConfig, row: int, first: int, last: int, window: int | None, sliding: int | None
) -> QueryBlock:
    """Lay out one query block. `window` overrides where the window starts (decode keeps it between
    refreshes)."""
    bk = config.block_k
    # keys before `start` are beyond the sliding window for every row
    start = 0 if sliding is None else max(0, first - sliding + 1) // bk * bk
    if window is None:
        window = max(0, first - config.window) // bk * bk
    window = max(window, start)
    sink_end = min(max(config.sink_end, start), window)
    return QueryBlock(row, first, last, start, sink_end, sink_end // bk, window // bk, window)


def query_blocks(
    config: HiPConfig, span: Span, per_row: bool, sliding: int | None = None
) -> list[QueryBlock]:
    """The query blocks of a span, aligned to positions; `per_row` (decode) makes every row its own
    block."""
    size = 1 if per_row else config.block_q
    blocks, position = [], span.position
    while position < span.end:
        last = min((position // size + 1) * size, span.end) - 1
        row = span.row_start + position - span.position
        blocks.append(make_query_block(config, row, position, last, None, sliding))
        position = last + 1
    return blocks


def keys_seen(first: int, last: int, sliding: int | None) -> int:
    """Keys in sight of the rows at positions `first` to `last`, summed over the rows."""
    if sliding is None:
        return (last + 1) * (last + 2) // 2 - first * (first + 1) // 2
    full = max(0, last - max(first, sliding) + 1)  # rows whose window is full
    growing = keys_seen(first, min(last, sliding - 1), None) if first < sliding else 0
    return full * sliding + growing


def keys_seen_at(positions: Sequence[int], sliding: int | None) -> int:
    """Keys in sight of the rows at ascending `positions`, summed over them."""
    growing = len(positions) if sliding is None else bisect_left(positions, sliding)
    return sum(positions[:growing]) + growing + (len(positions) - growing) * (sliding or 0)


def block_read(block: QueryBlock, picked: int, sliding: int | None) -> int:
    """Keys that the rows of a query block read, summed over the rows; `picked`: those that are
    selected."""
    fixed = block.sink_end - block.start - block.window_start + picked
    read = keys_seen(block.first, block.last, None) + block.rows * fixed
    return min(read, keys_seen(block.first, block.last, sliding))


def mask_heads(config: HiPConfig, query_heads: int, key_heads: int) -> int:
    """Selections of a query block: one for each key head where the heads of its group share it,
    else one for each query head."""
    return key_heads if config.group_shared else query_heads


@dataclass(eq=False)
class BlockMask:
    """Which key blocks each query block reads between sink and window.

    `indices` int32 `[B, H, Nq, budget / block_k]`, sorted, of which the first `counts` int32
    `[B, H, Nq]` count; block `i` holds the keys `i * block_k` to `(i + 1) * block_k - 1` of the
    row, counted from its first real key. `H` is Hkv with a shared mask, else Hq. `first` int32
    `[B, Nq]`: position of the query block's first row, -1 where the row has no such block.
    """

    indices: Tensor
    counts: Tensor
    first: Tensor
    block_q: int
    block_k: int
