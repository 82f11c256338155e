"""What selectors and backends share: the geometry of query blocks, and the mask of selected key blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from hip_hf.cache.pages import KeyRows
    from hip_hf.config import HiPConfig
    from hip_hf.problem import Span
    from hip_hf.rope import Positions


@dataclass(frozen=True)
class QueryBlock:
    """Query rows that share a selection, and what they always read. Everything is relative to the span.

    The rows sit at positions `first` to `last`. They read the sink `[start, sink)`, the window `[window, last]`, and of
    the *middle*, the key blocks `low` to `high - 1` between the two, those that are selected.
    """

    row: int
    first: int
    last: int
    start: int
    sink: int
    low: int
    high: int
    window: int

    @property
    def rows(self) -> int:
        return self.last - self.first + 1

    @property
    def middle(self) -> int:
        return self.high - self.low


def make_query_block(config: HiPConfig, row: int, first: int, last: int, window: int | None, sliding: int | None) -> QueryBlock:
    """Lay out one query block. `window` overrides where the window starts (decode keeps it between refreshes)."""
    bk = config.block_k
    # keys before `start` are beyond the sliding window for every row
    start = 0 if sliding is None else max(0, first - sliding + 1) // bk * bk
    if window is None:
        window = max(0, first - config.window) // bk * bk
    window = max(window, start)
    sink = min(max(-(-config.sink // bk) * bk, start), window)
    return QueryBlock(row, first, last, start, sink, sink // bk, window // bk, window)


def query_blocks(config: HiPConfig, span: Span, per_row: bool, sliding: int | None = None) -> list[QueryBlock]:
    """The query blocks of a span, aligned to positions; `per_row` (decode) makes every row its own block."""
    size = 1 if per_row else config.block_q
    blocks, position = [], span.position
    while position < span.end:
        last = min((position // size + 1) * size, span.end) - 1
        row = span.row_start + position - span.position
        blocks.append(make_query_block(config, row, position, last, None, sliding))
        position = last + 1
    return blocks


def squash(logits: torch.Tensor, softcap: float | None) -> None:
    """`softcap * tanh(logits / softcap)`, in place; None: nothing."""
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


class Bound(Protocol):
    """A selection rule bound to the queries and keys of one span."""

    def select(self, heads: slice, blocks: list[QueryBlock]) -> torch.Tensor:
        """Sorted indices int64 `[heads, S, len(blocks), budget]` of the key blocks that each query block reads.

        `heads` are key heads; `S` is 1 where the group shares its mask, else the number of query heads per key head.
        Every given query block has a middle of more than `budget` blocks; smaller ones are read whole. Where the selector
        `asks_need`, a third argument: `near` `[heads, G, rows]`, log-sum-exp of the blocks' rows over what they always read.
        """


class Selector(Protocol):
    """A method: says which key blocks each query block reads. `budget`: blocks it picks at most.

    With an attribute `reads_pages` that is true, `bind` and the pyramid may get `PagedKeys`; else a cache in pages is gathered.
    With an attribute `asks_need` that is true, its rule knows how much each row attends to what it always reads.
    With an attribute `extends` that is true, it works under context extension: `bind` then gets keys that are not rotated, and q
    rotated as if all keys were just outside the window. What it binds has `chunk_indexed(positions)`, the same for the first
    layers, where chunks count their distance from the window (`rope.py`); `Unplaced` where nothing depends on that.
    """

    budget: int

    def __init__(self, config: HiPConfig) -> None: ...

    def make_pyramid(self, dtype: torch.dtype) -> Any:
        """An empty pyramid of summaries in `dtype`, or None if the method keeps none. It is asked for what `Pyramid` has
        (`methods/pyramid.py`): `block_k`, `blocks`, `shared`, `nbytes`, `copy`, `writable`, `extend` and `truncate`."""

    def bind(self, q: torch.Tensor, keys: KeyRows, pyramid: Any, scale: float, softcap: float | None) -> Bound:
        """q `[Hkv, G, rows, D]` and keys `[Hkv, T, D]` of one span; `pyramid` covers every query block's middle."""


class Unplaced:
    """What bound rules share that look at no chunks, which could be placed."""

    def chunk_indexed(self, positions: Positions) -> Any:
        return self


class Unsummarised:
    """What selectors without a pyramid share."""

    def __init__(self, config: HiPConfig) -> None:
        self.config = config
        self.budget = config.budget_blocks

    def make_pyramid(self, dtype: torch.dtype) -> None:
        return None


@dataclass
class BlockMask:
    """Which key blocks each query block reads between sink and window.

    `indices` int32 `[B, H, Nq, budget / block_k]`, sorted, of which the first `counts` int32 `[B, H, Nq]` count; block `i`
    holds the keys `i * block_k` to `(i + 1) * block_k - 1` of the row, counted from its first real key. `H` is Hkv with a
    shared mask, else Hq. `first` int32 `[B, Nq]`: position of the query block's first row, -1 where the row has no such block.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    first: torch.Tensor
    block_q: int
    block_k: int
