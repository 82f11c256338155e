"""The tree search (`methods/hip.py` is its readable twin).

One program per sequence, mask head and query block scores the start level, keeps the best, scores
their children, down to single key blocks, and looks at the best of those exactly if asked.
Candidates, scores and top-k never leave the chip; only a start level longer than a tile
(`coarsest`) puts its scores into scratch, which the programs of one launch have (`search.py`). In
decode steps of few sequences several programs search for the same and share the exact look, and
another launch chooses (`choose.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.sequences import (
    GROWING,
    always_read,
    load_sequence,
    query_block,
    still_serves,
    window_start,
)
from hip_hf.backends.triton.pyramid import chunk_rows
from hip_hf.backends.triton.selection.scoring import (
    block_masses,
    chunk_logits,
    near_share,
    score_blocks,
    score_chunks,
    voting_offsets,
)
from hip_hf.backends.triton.selection.topk import (
    ABSENT,
    keep_best,
    merge_long,
    pair,
    read_on,
    sort_keys,
)
from hip_hf.backends.triton.selection.voting import count_votes, count_walkers

# Candidates at the edges of the searched range are two at most; a tile of them is as small as
# matrix instructions allow.
EDGES = tl.constexpr(16)
# `made` of a selection that must not be used again.
NEVER = tl.constexpr(-(2**30))


@triton.jit
def ceil_shift(x, level):
    return (x + (1 << level) - 1) >> level


@triton.jit
def places_back(end, ids, farthest):
    """Chunk-indexed selection: how far chunks `ids` are from the window, which begins with chunk
    `end` (`methods/hip.py`)."""
    return tl.minimum(tl.maximum(end - 1 - ids, 0), farthest)


@triton.jit
def place_of(number, blocks):
    """Return where program `number` works, as scalars: the index of its query block, the longest
    searches first, and its row of mask head and sequence."""
    row = number // blocks
    return blocks - 1 - (number - row * blocks), row


@triton.jit
def entry_of(number, blocks):
    """Return the index (int64, a scalar) of the results of program `number`."""
    index, row = place_of(number, blocks)
    return row.to(tl.int64) * blocks + index


@triton.jit
def write(indices, counts, entry, ids, total, BUDGET: tl.constexpr, OUT: tl.constexpr):
    """The result: the first `total` of `ids` `[OUT]`, then zeros."""
    slots = tl.arange(0, OUT)
    tl.store(indices + entry * BUDGET + slots, tl.where(slots < total, ids, 0), mask=slots < BUDGET)
    # by the first slot's thread: who stores a scalar would be kept in a register from the program's
    # first store on
    tl.store(counts + entry + slots, total + slots * 0, mask=slots == 0)


@triton.jit
def lay_out(first, window, sink, sliding, BLOCK_K: tl.constexpr):
    """Return for a query block whose first row is at `first` where its window starts, and its
    candidates, the blocks `low` to `high - 1`, all as scalars."""
    begin = window_start(first, window, BLOCK_K)
    _, sink_end, window_at = always_read(first, begin, sink, sliding, BLOCK_K)
    return begin, sink_end // BLOCK_K, window_at // BLOCK_K


@triton.jit
def votes_near(
    near, row, index, row_start, last_row, first, last, candidates, stride_near,
    CHOSEN: tl.constexpr, MEMBERS: tl.constexpr, VOTES: tl.constexpr, VOTES_WHOLE: tl.constexpr,
    MOST: tl.constexpr, SPACING: tl.constexpr, SAMPLES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return a pointer to what the votes of a query block find near, fp32, and their rows: the last
    row, and the first and last as positions (scalars)."""
    near += row.to(tl.int64) * GROUP * stride_near
    if CHOSEN:
        last_row = (
            count_votes(last - first + 1, candidates, MEMBERS, VOTES, VOTES_WHOLE, MOST, SPACING)
            - 1
        )
        return near + index.to(tl.int64) * SAMPLES, last_row, first - first, last_row
    else:
        return near - row_start, last_row, first, last


@triton.jit
def look(
    ids, total, low, high, indices, counts, entry, listed, found, part, k, key_start, batch,
    stride_kb, stride_kt, block_table, stride_table, q, stride_qh, stride_qt, near, stride_near,
    last_row, first, last, scale, farthest, cos, sin, SOFTCAP: tl.constexpr, N: tl.constexpr,
    BUDGET: tl.constexpr, OUT: tl.constexpr, LOOKS: tl.constexpr, LIST: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    NARROW: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    MASS: tl.constexpr, WEIGHED: tl.constexpr, ONWARD: tl.constexpr, DIM: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """The end of a search: all votes look at all keys of the blocks `ids` `[N]`, sorted, of which
    `total` count, and the best are written. `LOOKS` > 1: they look at the `part`-th part of each
    block's keys; what is `found`, and with `LIST` which blocks they are, is left to `choose.py`."""
    slot = tl.arange(0, N)
    inside = slot < total
    ids = tl.where(inside, ids, low)
    back = places_back(high, ids, farthest)
    if LOOKS > 1:
        EACH: tl.constexpr = (BLOCK_K + LOOKS - 1) // LOOKS
        if LIST:
            tl.store(listed + slot, tl.where(inside, ids, -1), mask=part + slot * 0 == 0)
        column = tl.arange(0, BLOCK_M)
        for tile in range(TILES):
            offsets = voting_offsets(
                tile, last_row, last, first, stride_qh, stride_qt, BLOCK_M, SAMPLES, STRIDE, GROUP
            )[0]
            mass, m_i = block_masses(
                k, ids, inside, part * EACH, tl.minimum(EACH, BLOCK_K - part * EACH), key_start,
                batch, stride_kb, stride_kt, block_table, stride_table, q, offsets, scale, SOFTCAP,
                N, BLOCK_K, PAGE_SIZE, BLOCK_M, MASS, DIM, FEATURES, PRECISION, back, cos, sin,
                ROPE_HALF_DIM)  # fmt: skip
            to = found + (part * TILES + tile) * ((N + 1) * NARROW) + column
            tl.store(
                to[None, :] + slot[:, None] * NARROW,
                mass,
                mask=(slot[:, None] >= 0) & (column < NARROW)[None, :],
            )
            tl.store(to + N * NARROW, m_i, mask=column < NARROW)
    else:
        scores = score_blocks(
            k, ids, inside, key_start, batch, stride_kb, stride_kt, block_table, stride_table, q,
            stride_qh, stride_qt, near, stride_near, last_row, first, last, scale, SOFTCAP, N,
            BLOCK_K, PAGE_SIZE, BLOCK_M, TILES, SAMPLES, STRIDE, GROUP, MASS, WEIGHED, DIM,
            FEATURES, PRECISION, back, cos, sin, ROPE_HALF_DIM)  # fmt: skip
        write_best(ids, scores, total, low, indices, counts, entry, N, BUDGET, OUT, ONWARD)


@triton.jit
def write_best(
    ids, scores, total, low, indices, counts, entry,
    N: tl.constexpr, BUDGET: tl.constexpr, OUT: tl.constexpr, ONWARD: tl.constexpr,
):  # fmt: skip
    """The result: the best of the blocks `ids` `[N]`, sorted, of which `total` count, by the
    `scores` of all their keys."""
    if ONWARD > 0:
        scores = read_on(scores, ids, total, ONWARD, N)
    none = low * 0 + ABSENT
    keys = sort_keys(scores, tl.arange(0, N) < total)
    ids, _, total = keep_best(ids, keys, low, none, low, none, BUDGET, N, OUT)
    write(indices, counts, entry, ids, total, BUDGET, OUT)


@triton.jit
def score_long(
    scratch, begins, count, table, q, stride_qh, stride_qt, near, stride_near, last_row, first,
    last, scale, steps, tiles, SOFTCAP: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
    SAMPLES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, MASS: tl.constexpr,
    WEIGHED: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, level, farthest, cos, sin,
    ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Scores of `count` chunks from `begins` on into `scratch`, tile by tile: once for the rows'
    norms, once for the scores."""
    inner = tl.arange(0, M)
    for tile in range(tiles):
        offsets, voting = voting_offsets(
            tile, last_row, last, first, stride_qh, stride_qt, BLOCK_M, SAMPLES, STRIDE,
            GROUP)  # fmt: skip
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        if MASS:
            for at in range(0, count, M):
                inside = at + inner < count
                rows = chunk_rows(begins + tl.where(inside, at + inner, 0), level)
                logits = chunk_logits(
                    table, rows, q, offsets, scale, steps, SOFTCAP, M, BLOCK_M, DIM, FEATURES,
                    PARTS, PRECISION, places_back(count, at + inner, farthest), cos, sin,
                    ROPE_HALF_DIM)  # fmt: skip
                logits = tl.where(inside[:, None], logits, -float("inf"))
                higher = tl.maximum(m_i, tl.max(logits, 0))
                l_i = l_i * tl.exp(m_i - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
                m_i = higher
            if WEIGHED:
                l_i += near_share(
                    near, stride_near, m_i, tl.log((BLOCK_K << level).to(tl.float32)), tile,
                    last_row, last, first, BLOCK_M, SAMPLES, STRIDE, GROUP)  # fmt: skip
            l_i = tl.where(voting, 1.0 / l_i, 0.0)
        for at in range(0, count, M):
            inside = at + inner < count
            rows = chunk_rows(begins + tl.where(inside, at + inner, 0), level)
            logits = chunk_logits(
                table, rows, q, offsets, scale, steps, SOFTCAP, M, BLOCK_M, DIM, FEATURES, PARTS,
                PRECISION, places_back(count, at + inner, farthest), cos, sin, ROPE_HALF_DIM,
            )  # fmt: skip
            to = scratch + at + inner
            if MASS:
                scores = tl.sum(tl.exp(logits - m_i[None, :]) * l_i[None, :], 1)
                scores += tl.load(to, mask=inside & (tile > 0), other=0.0)
            else:
                scores = tl.max(tl.where(voting[None, :], logits, -float("inf")), 1)
                scores = tl.maximum(
                    scores, tl.load(to, mask=inside & (tile > 0), other=-float("inf"))
                )
            tl.store(to, scores, mask=inside)
        tl.debug_barrier()  # the next tile of rows, and the merge, read what other threads wrote


@triton.jit(do_not_specialize=[*GROWING, "stride_near", "stride_scratch", "heads", "first_program"])
def select_kernel(
    q, table, k, block_table, sequences, scratch, indices, counts, windows, made, near, listed,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_table, stride_field,
    stride_sequence, stride_head, stride_near, stride_scratch, blocks, heads, first_program, scale,
    sink, window, sliding, refresh, steps, COS, SIN, farthest, BUDGET: tl.constexpr,
    KEEP: tl.constexpr, LAST: tl.constexpr, MOST: tl.constexpr, LIMIT: tl.constexpr,
    M: tl.constexpr, KEPT: tl.constexpr, KEPT_LAST: tl.constexpr, RESCORE: tl.constexpr,
    START_LEVEL_IN_MEMORY: tl.constexpr, STATEFUL: tl.constexpr, CHOSEN: tl.constexpr,
    WEIGHED: tl.constexpr, MEMBERS: tl.constexpr, VOTES: tl.constexpr, VOTES_WHOLE: tl.constexpr,
    WALKERS: tl.constexpr, SPACING: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEADS_PER_KEY: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    MASS: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, FEATURES_LAST: tl.constexpr,
    PARTS: tl.constexpr, LOOKS: tl.constexpr, NARROW: tl.constexpr, ROWS_WHOLE: tl.constexpr,
    TILES_WHOLE: tl.constexpr, NARROW_WHOLE: tl.constexpr, FOUND: tl.constexpr,
    ONWARD: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
    ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """One query block of one mask head of one sequence. Grid: as many of the `blocks` * `heads` *
    sequences as have scratch, from `first_program` on, and `LOOKS`; `blocks` query blocks and
    `heads` mask heads a sequence.

    At most `MOST` candidates are looked at whole. Of more, `KEEP` chunks survive a level, `LAST`
    blocks the last one (more than `BUDGET` only to be rescored); the search starts with at most
    `MOST` chunks, or at level `LIMIT`. `STATEFUL`: a selection `made` less than `refresh` steps ago
    stays; one row at a time, for after a step of several rows the next one selects anew. `CHOSEN`:
    `q` is `[S, heads, blocks * SAMPLES, D]`, the votes that `votes.py` put side by side, of which
    it says what MEMBERS, VOTES, VOTES_WHOLE, WALKERS and SPACING mean. `WEIGHED`: `near` is what
    every vote, or row of a sequence, finds in any case. `ROPE_HALF_DIM` > 0: this many pairs of a
    head's numbers rotate, chunk-indexed, at most `farthest` chunks away. `LOOKS` > 1: this many
    programs search, all for the same, and each looks at a part of the keys of each of the last
    blocks. These go into `listed`, int32 `[programs, KEPT_LAST]`, -1 where there is none (not those
    that are looked at whole); what `NARROW` rows of each tile, those that may vote, found in their
    keys into the `FOUND` numbers of a program's `scratch`, fp32
    `[LOOKS, TILES, KEPT_LAST + 1, NARROW]`, in the last place what was subtracted; of candidates
    looked at whole `[LOOKS, TILES_WHOLE, M + 1, NARROW_WHOLE]`. The rest is left to `choose.py`.
    """
    index, row = place_of(first_program + tl.program_id(0), blocks)
    sequence = row // heads
    head = row - sequence * heads
    batch, key_start, row_start, rows, position = load_sequence(sequences, stride_field, sequence)
    last_row, first, last = query_block(row_start, rows, position, index, BLOCK_Q)
    last_row += last - first
    entry = entry_of(first_program + tl.program_id(0), blocks)
    if first > last:
        if LOOKS == 1:
            write(indices, counts, entry, tl.arange(0, OUT), first * 0, BUDGET, OUT)
            tl.store(windows + entry, 0)
        return
    if STATEFUL:
        if still_serves(made + entry, position, rows, refresh):
            return
        if LOOKS == 1:
            tl.debug_barrier()  # every thread has read the age before one of them makes it 0
            tl.store(made + entry, tl.where(rows == 1, first, NEVER))
    begin, low, high = lay_out(first, window, sink, sliding, BLOCK_K)
    if LOOKS == 1:
        tl.store(windows + entry, begin)
    if high - low <= BUDGET:
        if LOOKS == 1:
            write(indices, counts, entry, low + tl.arange(0, OUT), high - low, BUDGET, OUT)
        return

    key_head = head // HEADS_PER_KEY
    q += ((sequence if CHOSEN else batch).to(tl.int64) * stride_qb
          + head.to(tl.int64) * GROUP * stride_qh)  # fmt: skip
    own_rows = last - first + 1
    if CHOSEN:
        q += index.to(tl.int64) * SAMPLES * stride_qt
    near, last_row, first, last = votes_near(
        near, row, index, row_start, last_row, first, last, high - low, stride_near, CHOSEN,
        MEMBERS, VOTES, VOTES_WHOLE, MOST, SPACING, SAMPLES, GROUP)  # fmt: skip
    # of the votes, the first walk the tree, and all look at the keys that these find
    walking_row, walking, tiles = last_row, last, TILES
    if CHOSEN:
        walking = count_walkers(last + 1, own_rows, MEMBERS, SPACING, WALKERS) - 1
        walking_row = walking
        if TILES > 1:
            tiles = walking // BLOCK_M + 1
    k += key_head.to(tl.int64) * stride_kh
    # two conditions in one would be asked at run time, and this compiled in any case
    if RESCORE:  # noqa: SIM102
        if high - low <= MOST:
            number = tl.program_id(0).to(tl.int64)
            look(
                low + tl.arange(0, M), high - low, low, high, indices, counts, entry, listed,
                scratch + number * FOUND, tl.program_id(1), k, key_start, batch, stride_kb,
                stride_kt, block_table, stride_table, q, stride_qh, stride_qt, near, stride_near,
                last_row, first, last, scale, farthest, COS, SIN, SOFTCAP, M, BUDGET, OUT, LOOKS,
                False, BLOCK_K, PAGE_SIZE, ROWS_WHOLE, TILES_WHOLE, NARROW_WHOLE, SAMPLES, STRIDE,
                GROUP, MASS, WEIGHED, ONWARD, DIM, FEATURES_LAST, PRECISION, ROPE_HALF_DIM,
            )  # fmt: skip
            return
    table += sequence.to(tl.int64) * stride_sequence + key_head.to(tl.int64) * stride_head
    slot = tl.arange(0, M)
    edge = tl.arange(0, EDGES)

    level = low * 0
    while (level < LIMIT) & ((high >> level) - ceil_shift(low, level) > MOST):
        level += 1
    begins, ends = ceil_shift(low, level), high >> level
    if START_LEVEL_IN_MEMORY:
        scratch += tl.program_id(0).to(tl.int64) * stride_scratch
        score_long(
            scratch, begins, ends - begins, table, q, stride_qh, stride_qt, near, stride_near,
            walking_row, first, walking, scale, steps, tiles, SOFTCAP, M, BLOCK_M, SAMPLES, STRIDE,
            GROUP, MASS, WEIGHED, BLOCK_K, DIM, FEATURES, PARTS, PRECISION, level, farthest, COS,
            SIN, ROPE_HALF_DIM)  # fmt: skip
        best, total = merge_long(
            scratch, begins, ends - begins, KEEP if KEEP > LAST else LAST, M // 2
        )
        ids = pair(best, best, M)
        inside = slot < total
        scores = tl.load(scratch + ids - begins, mask=inside, other=0.0)
    else:
        ids = begins + slot
        inside = ids < ends
        at = chunk_rows(tl.where(inside, ids, begins), level)
        scores, _ = score_chunks(
            table, at, inside, edge, edge < 0, q, stride_qh, stride_qt, near, stride_near,
            walking_row, first, walking, BLOCK_K << level, scale, steps, tiles, SOFTCAP, M, EDGES,
            BLOCK_M, SAMPLES, STRIDE, GROUP, MASS, WEIGHED, DIM, FEATURES, PARTS, PRECISION, False,
            places_back(ends, ids, farthest), edge, COS, SIN, ROPE_HALF_DIM)  # fmt: skip
    keys = sort_keys(scores, inside)
    left = level * 0 + ABSENT
    right = level * 0 + ABSENT

    for _ in tl.range(level, disable_licm=True):
        parents, _, total = keep_best(ids, keys, begins, left, ends - 1, right, KEEP, M, KEPT)
        level -= 1
        was_begins, was_ends = begins, ends
        begins, ends = ceil_shift(low, level), high >> level
        ids = tl.reshape(tl.join(2 * parents, 2 * parents + 1), (M,))
        inside = slot < 2 * total
        at = chunk_rows(tl.where(inside, ids, begins), level)
        edge_at = chunk_rows(tl.where(edge == 0, begins, ends - 1), level)
        edge_inside = ((edge == 0) & (begins != 2 * was_begins)) | (
            (edge == 1) & (ends != 2 * was_ends)
        )
        scores, edge_scores = score_chunks(
            table, at, inside, edge_at, edge_inside, q, stride_qh, stride_qt, near, stride_near,
            walking_row, first, walking, BLOCK_K << level, scale, steps, tiles, SOFTCAP, M, EDGES,
            BLOCK_M, SAMPLES, STRIDE, GROUP, MASS, WEIGHED, DIM, FEATURES, PARTS, PRECISION, True,
            places_back(ends, ids, farthest),
            places_back(ends, tl.where(edge == 0, begins, ends - 1), farthest), COS, SIN,
            ROPE_HALF_DIM)  # fmt: skip
        keys = sort_keys(scores, inside)
        edge_keys = sort_keys(edge_scores, edge_inside)
        left = tl.sum(tl.where(edge == 0, edge_keys, 0), 0)
        right = tl.sum(tl.where(edge == 1, edge_keys, 0), 0)

    ids, _, total = keep_best(ids, keys, begins, left, ends - 1, right, LAST, M, KEPT_LAST)
    # computed again: kept all the while, these addresses would take registers from the tiles
    entry = entry_of(first_program + tl.program_id(0), blocks)
    if RESCORE:
        batch, key_start, _, _, _ = load_sequence(sequences, stride_field, sequence)
        number = tl.program_id(0).to(tl.int64)
        look(
            ids, total, low, high, indices, counts, entry, listed + number * KEPT_LAST,
            scratch + number * FOUND, tl.program_id(1), k, key_start, batch, stride_kb, stride_kt,
            block_table, stride_table, q, stride_qh, stride_qt, near, stride_near, last_row, first,
            last, scale, farthest, COS, SIN, SOFTCAP, KEPT_LAST, BUDGET, OUT, LOOKS, True, BLOCK_K,
            PAGE_SIZE, BLOCK_M, TILES, NARROW, SAMPLES, STRIDE, GROUP, MASS, WEIGHED, ONWARD, DIM,
            FEATURES_LAST, PRECISION, ROPE_HALF_DIM)  # fmt: skip
    else:
        write(indices, counts, entry, ids, total, BUDGET, OUT)
