"""The end of a search that several programs shared (`select.py`): one per search puts together what
they found, and chooses.

A launch of its own, so that no program waits for another, and sums are always made in the same
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.sequences import (
    GROWING,
    load_sequence,
    query_block,
    still_serves,
)
from hip_hf.backends.triton.selection.scoring import add_masses, voting_rows
from hip_hf.backends.triton.selection.select import (
    NEVER,
    entry_of,
    lay_out,
    place_of,
    votes_near,
    write,
    write_best,
)


@triton.jit
def merged_masses(
    found, tile, LOOKS: tl.constexpr, TILES: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr,
    MASS: tl.constexpr,
):  # fmt: skip
    """What the rows of a tile found in all keys of a search's blocks, as `block_masses` says of
    those of one look."""
    slot, column = tl.arange(0, N), tl.arange(0, BLOCK_M)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    mass = tl.full([N, BLOCK_M], 0.0 if MASS else -float("inf"), tl.float32)
    for look in range(LOOKS):
        at = found + (look * TILES + tile) * ((N + 1) * BLOCK_M) + column
        more = tl.load(at[None, :] + slot[:, None] * BLOCK_M)
        if MASS:
            m_more = tl.load(at + N * BLOCK_M)
            m_new = tl.maximum(m_i, m_more)
            mass = mass * tl.exp(m_i - m_new)[None, :] + more * tl.exp(m_more - m_new)[None, :]
            m_i = m_new
        else:
            mass = tl.maximum(mass, more)
    return mass, m_i


@triton.jit
def choose(
    ids, total, low, found, near, stride_near, last_row, last, first, indices, counts, entry,
    N: tl.constexpr, BUDGET: tl.constexpr, OUT: tl.constexpr, LOOKS: tl.constexpr,
    TILES: tl.constexpr, NARROW: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, MASS: tl.constexpr, WEIGHED: tl.constexpr, ONWARD: tl.constexpr,
):  # fmt: skip
    """Write the best of the blocks `ids` `[N]`, of which `total` count, by what was `found` in
    their keys."""
    scores = tl.full([N], 0.0 if MASS else -float("inf"), tl.float32)
    for tile in range(TILES):
        mass, m_i = merged_masses(found, tile, LOOKS, TILES, N, NARROW, MASS)
        voting = voting_rows(tile, last_row, last, first, NARROW, SAMPLES, STRIDE, GROUP)[2]
        scores = add_masses(
            scores, mass, m_i, near, stride_near, tile, last_row, last, first, voting, NARROW,
            SAMPLES, STRIDE, GROUP, MASS, WEIGHED)  # fmt: skip
    write_best(ids, scores, total, low, indices, counts, entry, N, BUDGET, OUT, ONWARD)


@triton.jit(do_not_specialize=[*GROWING, "stride_near", "heads"])
def choose_kernel(
    listed, found, sequences, near, indices, counts, windows, made, stride_field, stride_near,
    blocks, heads, sink, window, sliding, refresh, BUDGET: tl.constexpr, MOST: tl.constexpr,
    M: tl.constexpr, KEPT_LAST: tl.constexpr, OUT: tl.constexpr, LOOKS: tl.constexpr,
    TILES: tl.constexpr, NARROW: tl.constexpr, TILES_WHOLE: tl.constexpr,
    NARROW_WHOLE: tl.constexpr, FOUND: tl.constexpr, CHOSEN: tl.constexpr, WEIGHED: tl.constexpr,
    MEMBERS: tl.constexpr, VOTES: tl.constexpr, VOTES_WHOLE: tl.constexpr, SPACING: tl.constexpr,
    SAMPLES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, MASS: tl.constexpr,
    ONWARD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks * heads * sequences,)`: select for a query block, from the blocks `listed` and
    what was `found` in their keys (scratch of `select_kernel`, whose other arguments these are, of
    the shapes told there). Nothing changes where a selection is kept."""
    number = tl.program_id(0)
    index, row = place_of(number, blocks)
    _, _, row_start, rows, position = load_sequence(sequences, stride_field, row // heads)
    last_row, first, last = query_block(row_start, rows, position, index, BLOCK_Q)
    last_row += last - first
    entry = entry_of(number, blocks)
    if first > last:
        write(indices, counts, entry, tl.arange(0, OUT), first * 0, BUDGET, OUT)
        tl.store(windows + entry, 0)
        return
    if still_serves(made + entry, position, rows, refresh):
        return
    tl.debug_barrier()  # every thread has read the age before one of them makes it 0
    tl.store(made + entry, tl.where(rows == 1, first, NEVER))
    begin, low, high = lay_out(first, window, sink, sliding, BLOCK_K)
    tl.store(windows + entry, begin)
    if high - low <= BUDGET:
        write(indices, counts, entry, low + tl.arange(0, OUT), high - low, BUDGET, OUT)
        return

    near, last_row, first, last = votes_near(
        near, row, index, row_start, last_row, first, last, high - low, stride_near, CHOSEN,
        MEMBERS, VOTES, VOTES_WHOLE, MOST, SPACING, SAMPLES, GROUP)  # fmt: skip
    number = number.to(tl.int64)
    found += number * FOUND
    if high - low <= MOST:
        choose(
            low + tl.arange(0, M), high - low, low, found, near, stride_near, last_row, last, first,
            indices, counts, entry, M, BUDGET, OUT, LOOKS, TILES_WHOLE, NARROW_WHOLE, SAMPLES,
            STRIDE, GROUP, MASS, WEIGHED, ONWARD)  # fmt: skip
    else:
        ids = tl.load(listed + number * KEPT_LAST + tl.arange(0, KEPT_LAST))
        choose(
            ids, tl.sum((ids >= 0).to(tl.int32), 0), low, found, near, stride_near, last_row, last,
            first, indices, counts, entry, KEPT_LAST, BUDGET, OUT, LOOKS, TILES, NARROW, SAMPLES,
            STRIDE, GROUP, MASS, WEIGHED, ONWARD)  # fmt: skip
