"""How many keys a call reads: counted only when somebody asks, as `explain` and measurements do. A
call keeps what there is to be counted, numbers alone and no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hip_hf.geometry import QueryBlock, Span, block_read, keys_seen, make_query_block, query_blocks

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# How many keys were read, and how many were in sight: both summed over query rows, per head.
Count = Callable[[], tuple[float, float]]


def density_of(count: Count | None) -> float:
    """Return the fraction of the keys in sight that were read; without a `count` all were."""
    read, visible = (1, 1) if count is None else count()
    return read / visible if visible else 1.0


def known(read: float, visible: float) -> tuple[float, float]:
    """Return a count that needs no counting."""
    return read, visible


def total_count(counts: Sequence[Count]) -> tuple[float, float]:
    """Add up the counts of several parts of a call."""
    read, visible = zip(*(count() for count in counts), strict=True)
    return sum(read), sum(visible)


def all_keys(spans: Sequence[Span], sliding: int | None) -> tuple[int, int]:
    """Count the keys of dense rows, which read all keys in sight."""
    visible = sum(keys_seen(span.position, span.end - 1, sliding) for span in spans)
    return visible, visible


def blocks_of(
    config: HiPConfig, span: Span, decoding: bool, sliding: int | None, window: int | None = None
) -> list[QueryBlock]:
    """The query blocks of a span, relative to it; in decode each row is one. `window`: where that
    of the only row starts, if a selection made earlier says so."""
    if window is not None:
        return [make_query_block(config, 0, span.position, span.position, window, sliding)]
    relative = Span(span.batch, 0, span.keys, 0, span.rows, span.position)
    return query_blocks(config, relative, decoding, sliding)


def of_blocks(
    config: HiPConfig,
    budget: int,
    spans: Sequence[Span],
    windows: Sequence[int | None],
    decoding: bool,
    sliding: int | None,
) -> tuple[int, int]:
    """Count the keys of query blocks that pick up to `budget` key blocks, and of a prompt's dense
    tail. A block whose last rows are dense counts by the share of the others. `windows` are as in
    `blocks_of`."""
    read = 0
    for span, window in zip(spans, windows, strict=True):
        dense = span.end if decoding else max(span.position, span.end - config.dense_tail)
        for block in blocks_of(config, span, decoding, sliding, window):
            own = block_read(block, min(block.num_candidates, budget) * config.block_k, sliding)
            read += own * max(0, min(block.rows, dense - block.first)) // block.rows
        read += keys_seen(dense, span.end - 1, sliding)
    return read, all_keys(spans, sliding)[1]
