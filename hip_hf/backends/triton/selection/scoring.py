"""Scores of candidates in the tree search: products with the voting query rows, and what the rows
make of them together.

Candidates are the long side of every tile, `[candidates, rows]`: so a few rows of decode and the
many of prefill meet the same matrix instructions, and the best of the rows stays within a thread's
neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.rotation import partner, unrotate
from hip_hf.backends.triton.common.sequences import offsets_in, page_of
from hip_hf.backends.triton.common.tiles import scaled_with_slope


@triton.jit
def voting_rows(
    tile, last_row, last, first, BLOCK_M: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Return head, row and validity, `[BLOCK_M]` each, of the `tile`-th `BLOCK_M` voting rows:
    every `STRIDE`-th row of the query block, counted back from its last, of each of the `GROUP`
    heads. What is not valid repeats the last row."""
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head, sample = index // SAMPLES, index % SAMPLES
    voting = (head < GROUP) & (sample * STRIDE <= last - first)
    return tl.where(voting, head, 0), last_row - tl.where(voting, sample, 0) * STRIDE, voting


@triton.jit
def voting_offsets(
    tile, last_row, last, first, stride_qh, stride_qt, BLOCK_M: tl.constexpr, SAMPLES: tl.constexpr,
    STRIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return offsets (int64, from the group's first head) and validity of voting rows, `[BLOCK_M]`
    each."""
    head, row, voting = voting_rows(tile, last_row, last, first, BLOCK_M, SAMPLES, STRIDE, GROUP)
    return head.to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qt, voting


@triton.jit
def near_share(
    near, stride_near, m_i, log_keys, tile, last_row, last, first, BLOCK_M: tl.constexpr,
    SAMPLES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return what voting rows find `near`, `[BLOCK_M]`, as one more candidate of a softmax from
    whose logits `m_i` `[BLOCK_M]` is subtracted. A candidate's logit stands for each of its keys
    (`log_keys`). It is loaded when it is needed: held, it would take registers from the tiles."""
    head, row, voting = voting_rows(tile, last_row, last, first, BLOCK_M, SAMPLES, STRIDE, GROUP)
    found = tl.load(near + head.to(tl.int64) * stride_near + row, mask=voting, other=-float("inf"))
    return tl.exp(found - log_keys - m_i)


@triton.jit
def chunk_logits(
    table, at, q, offsets, scale, steps, SOFTCAP: tl.constexpr, M: tl.constexpr,
    BLOCK_M: tl.constexpr, DIM: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, back, cos, sin, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Logits `[M, BLOCK_M]` of the chunks in the table's rows `at` `[M]`: `PARTS` 2 multiplies
    `[q, |q|]` with centre and spread. `FEATURES` numbers of the head dim at a time. `ROPE_HALF_DIM`
    > 0: chunks are rotated back by `back` `[M]` places (`methods/pyramid.py`)."""
    CHUNKS: tl.constexpr = (DIM + FEATURES - 1) // FEATURES
    inner = tl.arange(0, FEATURES)
    # a table may hold more than 2**31 numbers
    at = at.to(tl.int64) * (PARTS * DIM)
    within = at[:, None] + inner[None, :]
    within_q = offsets[None, :] + inner[:, None]
    acc = tl.zeros([M, BLOCK_M], tl.float32)
    for i in tl.range(steps, disable_licm=True):
        part = i // CHUNKS
        d = (i - part * CHUNKS) * FEATURES
        to_a = table + part * DIM + d + within
        to_b = q + d + within_q
        if DIM % FEATURES == 0:
            a = tl.load(to_a)
            b = tl.load(to_b)
        else:
            a = tl.load(to_a, mask=(d + inner < DIM)[None, :], other=0.0)
            b = tl.load(to_b, mask=(d + inner < DIM)[:, None], other=0.0)
        if ROPE_HALF_DIM > 0:
            to_other = table + part * DIM + at[:, None]
            to_other += partner(d + inner, ROPE_HALF_DIM)[None, :]
            other = tl.load(to_other, mask=(d + inner < DIM)[None, :], other=0.0)
            a = unrotate(a, other, back, d + inner, cos, sin, part > 0, ROPE_HALF_DIM).to(a.dtype)
        if PARTS > 1:
            b = tl.where(part > 0, tl.abs(b), b)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    return scaled_with_slope(acc, scale, SOFTCAP, SOFTCAP > 0)[0]


@triton.jit
def score_chunks(
    table, at, inside, edge_at, edge_inside, q, row_stride_h, row_stride_t, near, near_stride,
    last_row, first, last, keys, scale, steps, tiles, SOFTCAP: tl.constexpr, M: tl.constexpr,
    EDGES: tl.constexpr, BLOCK_M: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, MASS: tl.constexpr, WEIGHED: tl.constexpr, DIM: tl.constexpr,
    FEATURES: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, HAS_EDGES: tl.constexpr,
    back, edge_back, cos, sin, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Scores of the chunks `[M]` and the edges `[EDGES]`, of `keys` keys each, fp32: `mass`, the
    rows' shares in a softmax over all of them and (`WEIGHED`) what the row finds `near`, summed, or
    the best logit. `at`: rows of the table, valid ones also where `inside` is false."""
    scores = tl.full([M], 0.0 if MASS else -float("inf"), tl.float32)
    edge_scores = tl.full([EDGES], 0.0 if MASS else -float("inf"), tl.float32)
    for tile in range(tiles):
        offsets, voting = voting_offsets(
            tile, last_row, last, first, row_stride_h, row_stride_t, BLOCK_M, SAMPLES, STRIDE, GROUP
        )
        if HAS_EDGES:
            edges = chunk_logits(
                table, edge_at, q, offsets, scale, steps, SOFTCAP, EDGES, BLOCK_M, DIM, FEATURES,
                PARTS, PRECISION, edge_back, cos, sin, ROPE_HALF_DIM)  # fmt: skip
            edges = tl.where(edge_inside[:, None], edges, -float("inf"))
        logits = chunk_logits(
            table, at, q, offsets, scale, steps, SOFTCAP, M, BLOCK_M, DIM, FEATURES, PARTS,
            PRECISION, back, cos, sin, ROPE_HALF_DIM)  # fmt: skip
        logits = tl.where(inside[:, None], logits, -float("inf"))
        if MASS:
            m_i = tl.max(logits, 0)
            if HAS_EDGES:
                m_i = tl.maximum(m_i, tl.max(edges, 0))
                edges = tl.exp(edges - m_i[None, :])
            logits = tl.exp(logits - m_i[None, :])
            l_i = tl.sum(logits, 0)
            if HAS_EDGES:
                l_i += tl.sum(edges, 0)
            if WEIGHED:
                l_i += near_share(
                    near, near_stride, m_i, tl.log(keys.to(tl.float32)), tile, last_row, last,
                    first, BLOCK_M, SAMPLES, STRIDE, GROUP)  # fmt: skip
            weight = tl.where(voting, 1.0 / l_i, 0.0)
            scores += tl.sum(logits * weight[None, :], 1)
            if HAS_EDGES:
                edge_scores += tl.sum(edges * weight[None, :], 1)
        else:
            scores = tl.maximum(scores, tl.max(tl.where(voting[None, :], logits, -float("inf")), 1))
            if HAS_EDGES:
                edge_scores = tl.maximum(
                    edge_scores, tl.max(tl.where(voting[None, :], edges, -float("inf")), 1)
                )
    return scores, edge_scores


@triton.jit
def block_masses(
    k, ids, inside, first_key, keys, key_start, batch, stride_kb, stride_kt, block_table,
    stride_table, q, offsets, scale, SOFTCAP: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, MASS: tl.constexpr, DIM: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, back, cos, sin, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """What voting rows find in `keys` keys, from number `first_key` on, of each of the key blocks
    `ids` `[N]`: `[N, BLOCK_M]` and `[BLOCK_M]`. For `mass`, sums of exponentials, and the rows'
    greatest logits, which were subtracted; else the best logits, and minus infinity.
    `ROPE_HALF_DIM` > 0: keys are rotated back by `back` `[N]` places."""
    CHUNKS: tl.constexpr = (DIM + FEATURES - 1) // FEATURES
    inner = tl.arange(0, FEATURES)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    mass = tl.full([N, BLOCK_M], 0.0 if MASS else -float("inf"), tl.float32)
    logits = tl.zeros([N, BLOCK_M], tl.float32)
    # a step's pages are looked up in the step before: keys that waited for them could not be
    # fetched ahead
    slots = key_start + ids * BLOCK_K + first_key
    page = page_of(slots, inside, batch, block_table, stride_table, PAGE_SIZE)
    # one flat loop over keys of the blocks and parts of the head dim, so that loads run ahead
    # across both
    for i in tl.range(keys * CHUNKS, disable_licm=True):
        key = i // CHUNKS
        part = i - key * CHUNKS
        d = part * FEATURES + inner
        at = offsets_in(page, slots + key, stride_kb, stride_kt, PAGE_SIZE)
        following = tl.minimum((i + 1) // CHUNKS, keys - 1)
        page = page_of(slots + following, inside, batch, block_table, stride_table, PAGE_SIZE)
        if DIM % FEATURES == 0:
            a = tl.load(k + at[:, None] + d[None, :])
            b = tl.load(q + offsets[None, :] + d[:, None])
        else:
            a = tl.load(k + at[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
            b = tl.load(q + offsets[None, :] + d[:, None], mask=(d < DIM)[:, None], other=0.0)
        if ROPE_HALF_DIM > 0:
            other = tl.load(
                k + at[:, None] + partner(d, ROPE_HALF_DIM)[None, :],
                mask=(d < DIM)[None, :],
                other=0.0,
            )
            a = unrotate(a, other, back, d, cos, sin, False, ROPE_HALF_DIM).to(a.dtype)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
        if part == CHUNKS - 1:
            logits = scaled_with_slope(logits, scale, SOFTCAP, SOFTCAP > 0)[0]
            logits = tl.where(inside[:, None], logits, -float("inf"))
            if MASS:
                # one maximum per row for all blocks: what it lets underflow would weigh nothing in
                # the softmax either
                higher = tl.maximum(m_i, tl.max(logits, 0))
                mass = mass * tl.exp(m_i - higher)[None, :] + tl.exp(logits - higher[None, :])
                m_i = higher
            else:
                mass = tl.maximum(mass, logits)
            logits = tl.zeros([N, BLOCK_M], tl.float32)
    return mass, m_i


@triton.jit
def add_masses(
    scores, mass, m_i, near, near_stride, tile, last_row, last, first, voting,
    BLOCK_M: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    MASS: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Scores `[N]` of key blocks after a tile of rows that found `mass` `[N, BLOCK_M]` in all their
    keys and, of `mass`, `m_i`."""
    if MASS:
        l_i = tl.sum(mass, 0)
        if WEIGHED:
            l_i += near_share(
                near, near_stride, m_i, 0.0, tile, last_row, last, first, BLOCK_M, SAMPLES, STRIDE,
                GROUP)  # fmt: skip
        weight = tl.where(voting, 1.0 / l_i, 0.0)
        return scores + tl.sum(mass * weight[None, :], 1)
    else:
        return tl.maximum(scores, tl.max(tl.where(voting[None, :], mass, -float("inf")), 1))


@triton.jit
def score_blocks(
    k, ids, inside, key_start, batch, stride_kb, stride_kt, block_table, stride_table, q,
    row_stride_h, row_stride_t, near, near_stride, last_row, first, last, scale,
    SOFTCAP: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, MASS: tl.constexpr, WEIGHED: tl.constexpr, DIM: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, back, cos, sin, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Scores `[N]` of key blocks `ids` by all their keys: `mass`, the rows' shares in a softmax
    over all keys of all the blocks and (`WEIGHED`) what the row finds `near`, summed, or the best
    logit. `ROPE_HALF_DIM` > 0: keys are rotated back by `back` `[N]` places."""
    scores = tl.full([N], 0.0 if MASS else -float("inf"), tl.float32)
    for tile in range(TILES):
        offsets, voting = voting_offsets(
            tile, last_row, last, first, row_stride_h, row_stride_t, BLOCK_M, SAMPLES, STRIDE, GROUP
        )
        mass, m_i = block_masses(
            k, ids, inside, 0, BLOCK_K, key_start, batch, stride_kb, stride_kt, block_table,
            stride_table, q, offsets, scale, SOFTCAP, N, BLOCK_K, PAGE_SIZE, BLOCK_M, MASS, DIM,
            FEATURES, PRECISION, back, cos, sin, ROPE_HALF_DIM)  # fmt: skip
        scores = add_masses(
            scores, mass, m_i, near, near_stride, tile, last_row, last, first, voting, BLOCK_M,
            SAMPLES, STRIDE, GROUP, MASS, WEIGHED)  # fmt: skip
    return scores
