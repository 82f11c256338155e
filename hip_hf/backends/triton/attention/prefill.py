"""Block-sparse flash attention over index lists (HiP, arXiv 2406.09827, section 3.2). Reference:
`torch/block_sparse.py`.

One kernel serves sparse prefill, decode (`decode.py` splits the keys and combines), dense rows and
dense rows at a stride (Delta correction, arXiv 2505.11254). A program attends for a tile of
`BLOCK_M` query rows of one query block times the query heads that share a selection, so each key
and value is loaded once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.arguments import GridAndArguments, Operands, Part, row_arguments
from hip_hf.backends.triton.common.rotation import partner, queries_with_rope, rotate, rotation
from hip_hf.backends.triton.common.sequences import (
    GROWING,
    always_read,
    load_sequence,
    offsets_in,
    page_of,
    query_block,
    window_start,
)
from hip_hf.backends.triton.common.tiles import (
    LN2,
    LOG2E,
    key_positions,
    listed_blocks,
    scaled,
    selected_keys,
)
from hip_hf.backends.triton.common.tuning import Tile


@triton.jit
def _attend_tiles(
    acc, m_i, l_i, q, k_base, v_base, low, high, clear, end, row_at, earliest, latest, shift, cos,
    sin, ids, start, sink_length, picked, window,
    key_start, batch, stride_kb, stride_kt, stride_vb, stride_vt, table, stride_table,
    scale, softcap, sliding, dim, dim_v,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, SLIDING: tl.constexpr,
    EVEN_HEADDIM: tl.constexpr, SAME_KV_STRIDES: tl.constexpr, PRECISION: tl.constexpr,
    ROPE_HALF_DIM: tl.constexpr, DISABLE_LICM: tl.constexpr,
):  # fmt: skip
    """Tiles `low` to `high - 1` of BLOCK_N slots each: the online softmax's sums after them. From
    tile `clear` on, a row sees the slots up to its `latest` one; ROPE_HALF_DIM > 0: always from its
    `earliest` one on, and keys are rotated to `slots - shift`.

    Where a tile's keys lie is found one tile ahead, and which blocks they belong to two tiles
    ahead. So no key waits for an index of the same turn, which is what lets the compiler fetch keys
    and values stages ahead, without waiting for products. For the same reason there is one loop,
    with masks behind a branch, and slots after the last one repeat it.
    """
    d, dv, n = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, BLOCK_N)
    slots = tl.minimum(low * BLOCK_N + n, end - 1)
    blocks = listed_blocks(slots, ids, sink_length, picked, BLOCK_K)
    position = key_positions(slots, blocks, start, sink_length, picked, window, BLOCK_K)
    page = page_of(key_start + position, slots < end, batch, table, stride_table, PAGE_SIZE)
    slots = tl.minimum((low + 1) * BLOCK_N + n, end - 1)
    blocks = listed_blocks(slots, ids, sink_length, picked, BLOCK_K)
    for i in tl.range(low, high, disable_licm=DISABLE_LICM):
        k_at = offsets_in(page, key_start + position, stride_kb, stride_kt, PAGE_SIZE)
        if SAME_KV_STRIDES:
            v_at = k_at
        else:
            v_at = offsets_in(page, key_start + position, stride_vb, stride_vt, PAGE_SIZE)
        k_ptr, v_ptr = k_base + k_at[:, None] + d[None, :], v_base + v_at[:, None] + dv[None, :]
        slots = i * BLOCK_N + n
        if EVEN_HEADDIM:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=(d < dim)[None, :], other=0.0)
        if ROPE_HALF_DIM > 0:
            other = tl.load(
                k_base + k_at[:, None] + partner(d, ROPE_HALF_DIM)[None, :],
                mask=(d < dim)[None, :],
                other=0.0,
            )
            k = rotate(k, other, tl.maximum(slots - shift, 0), d, cos, sin, ROPE_HALF_DIM).to(
                k.dtype
            )
        logits = scaled(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP)
        if i >= clear:
            seen = slots[None, :] <= latest[:, None]
            if SLIDING:
                seen &= position[None, :] > row_at[:, None] - sliding
            logits = tl.where(seen, logits, float("-inf"))
        if ROPE_HALF_DIM > 0:
            logits = tl.where(slots[None, :] >= earliest[:, None], logits, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen nothing yet
        shrink = tl.exp2(m_i - base)
        weights = tl.exp2(logits - base[:, None])
        l_i = l_i * shrink + tl.sum(weights, 1)
        if EVEN_HEADDIM:
            v = tl.load(v_ptr)
        else:
            v = tl.load(v_ptr, mask=(dv < dim_v)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m_i = m_new
        slots = tl.minimum(slots + BLOCK_N, end - 1)
        position = key_positions(slots, blocks, start, sink_length, picked, window, BLOCK_K)
        page = page_of(key_start + position, slots < end, batch, table, stride_table, PAGE_SIZE)
        blocks = listed_blocks(
            tl.minimum((i + 2) * BLOCK_N + n, end - 1), ids, sink_length, picked, BLOCK_K
        )
    return acc, m_i, l_i


@triton.jit(do_not_specialize=GROWING)
def attend_kernel(
    Q, K, V, OUT, LSE, INDICES, COUNTS, WINDOWS, SINKS, SEQUENCES, TABLE, COS, SIN,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_os, stride_ob, stride_oh, stride_ot, stride_ls, stride_lb, stride_lh,
    stride_lt, stride_field, stride_table,
    blocks, lists, most, kept, sink_keys, window_keys, dim, dim_v, scale, softcap, sliding, trained,
    scaling, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    LISTS_PER_HEAD: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    EVEN_HEADDIM: tl.constexpr, SAME_KV_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SELECTED: tl.constexpr, KEPT_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, SOFTCAP: tl.constexpr, SLIDING: tl.constexpr, PRECISION: tl.constexpr,
    ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles, lists * SPLITS, sequences)`; a list is the heads that share a selection. The
    tensors have the shapes of `Operands` and `Reads`.

    STRIDE 1: query rows as they come, in query blocks of BLOCK_Q. STRIDE > 1: rows 0, STRIDE, 2
    STRIDE, ... of each sequence, written side by side into row `sequence` of the output.
    ROPE_HALF_DIM > 0: this many pairs of a head's numbers are rotated, to places counted along the
    list of slots, and no row is farther than `trained - 1` from a key (`rope.py`).
    """
    tile = tl.program_id(0)
    head_list, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    sequence = tl.program_id(2)
    batch, key_start, row_start, rows, position = load_sequence(SEQUENCES, stride_field, sequence)

    # The tile's rows: positions `first`, `first + STRIDE`, ... up to `last`; the query block begins
    # at `block_first`.
    if STRIDE > 1:
        tile = tl.num_programs(0) - 1 - tile  # the longest first
        block = tile
        block_first = position
        first = position + tile * (BLOCK_M * STRIDE)
        last = tl.minimum(first + (BLOCK_M - 1) * STRIDE, position + rows - 1)
        q_row, out_row, out_batch = (
            row_start + tile * (BLOCK_M * STRIDE),
            tile * BLOCK_M,
            sequence,
        )
    else:
        TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
        block = tile // TILES
        block_row, block_first, block_last = query_block(row_start, rows, position, block, BLOCK_Q)
        first = block_first + tile % TILES * BLOCK_M
        last = tl.minimum(first + BLOCK_M - 1, block_last)
        q_row = block_row + tile % TILES * BLOCK_M
        out_row, out_batch = q_row, batch
    if first > last:
        return

    # Tile row m is query row m // GROUP_PADDED of head m % GROUP_PADDED.
    m = tl.arange(0, BLOCK_M * GROUP_PADDED)
    row, member = m // GROUP_PADDED, m % GROUP_PADDED
    row_at = first + row * STRIDE
    real = (row_at <= last) & (member < GROUP)
    head = (head_list * GROUP + member).to(tl.int64)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    q_ptr = (
        Q
        + batch.to(tl.int64) * stride_qb
        + head * stride_qh
        + (q_row + row * STRIDE).to(tl.int64) * stride_qt
    )
    here = real[:, None] & (d < dim)[None, :]
    if ROPE_HALF_DIM == 0:
        q = tl.load(q_ptr[:, None] + d[None, :], mask=here, other=0.0)

    if KEPT_WINDOW:
        window = tl.load(WINDOWS + sequence * kept + block)
    else:
        window = window_start(block_first, window_keys, BLOCK_K)
    if STRIDE > 1:
        start, sink, window = always_read(first, 0, 0, sliding, BLOCK_K)
    else:
        start, sink, window = always_read(block_first, window, sink_keys, sliding, BLOCK_K)
    sink_length = sink - start
    ids, picked = selected_keys(
        INDICES, COUNTS, sequence, head_list, block, lists, blocks, most, BLOCK_K, SELECTED
    )

    # In front of the window and up to its first row, every row of the tile sees every slot.
    base = sink_length + picked - window
    clear, end = (base + first + 1) // BLOCK_N, base + last + 1
    if SLIDING:
        clear = 0
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    if SPLITS > 1:
        share = (tiles + SPLITS - 1) // SPLITS
        low = tl.minimum(split * share, tiles)
        high = tl.minimum(low + share, tiles)
    else:
        low, high = 0, tiles

    m_i = tl.full([BLOCK_M * GROUP_PADDED], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M * GROUP_PADDED], tl.float32)
    acc = tl.zeros([BLOCK_M * GROUP_PADDED, DV], tl.float32)
    if HAS_SINKS:
        extra = tl.load(SINKS + head, mask=member < GROUP, other=0.0).to(tl.float32) * LOG2E
        m_i = tl.where(split == 0, extra, m_i)  # once, not in every split
        l_i = tl.where(split == 0, 1.0, l_i)

    key_head = (head_list // LISTS_PER_HEAD).to(tl.int64)
    k_base, v_base = K + key_head * stride_kh, V + key_head * stride_vh
    own = base + row_at
    if ROPE_HALF_DIM > 0:
        # slots before `far` are too far for some rows and count as farthest, those before `shift`
        # for all
        shift, far = (
            tl.maximum(base + first + 1 - trained, 0),
            tl.maximum(base + last + 1 - trained, 0),
        )
        earliest = own - trained + 1
        stop = tl.minimum((far + BLOCK_N - 1) // BLOCK_N, high)
        # a scope of its own, so that loaded queries are not kept in registers for the second turn
        if low < stop:
            farthest = tl.full([BLOCK_M * GROUP_PADDED], trained - 1, tl.int32)
            q = queries_with_rope(q_ptr, here, farthest, d, COS, SIN, scaling, ROPE_HALF_DIM).to(
                Q.dtype.element_ty
            )
            acc, m_i, l_i = _attend_tiles(
                acc, m_i, l_i, q, k_base, v_base, low, stop, 0, end, row_at, earliest, earliest - 1,
                shift, COS, SIN, ids, start, sink_length, picked, window,
                key_start, batch, stride_kb, stride_kt, stride_vb, stride_vt, TABLE, stride_table,
                scale, softcap, sliding, dim, dim_v,
                BLOCK_K, BLOCK_N, D, DV, PAGE_SIZE, SOFTCAP, SLIDING, EVEN_HEADDIM, SAME_KV_STRIDES,
                PRECISION, 0, True,
            )  # fmt: skip
        # By 1, or 0 by 0. Otherwise the next turn's sums are registers that hold either zeros or
        # this turn's sums, and ptxas lets the tensor cores wait for each of their instructions
        # (C7515).
        acc *= tl.exp2(m_i - tl.where(m_i == float("-inf"), 0.0, m_i))[:, None]
        low = tl.maximum(low, shift // BLOCK_N)
        q = queries_with_rope(q_ptr, here, own - shift, d, COS, SIN, scaling, ROPE_HALF_DIM).to(
            Q.dtype.element_ty
        )
    else:
        shift, earliest = 0, own
    acc, m_i, l_i = _attend_tiles(
        acc, m_i, l_i, q, k_base, v_base, low, high, clear, end, row_at, earliest, own, shift, COS,
        SIN, ids, start, sink_length, picked, window,
        key_start, batch, stride_kb, stride_kt, stride_vb, stride_vt, TABLE, stride_table,
        scale, softcap, sliding, dim, dim_v,
        BLOCK_K, BLOCK_N, D, DV, PAGE_SIZE, SOFTCAP, SLIDING, EVEN_HEADDIM, SAME_KV_STRIDES,
        PRECISION, ROPE_HALF_DIM, ROPE_HALF_DIM > 0,
    )  # fmt: skip
    nothing = l_i == 0.0
    out = acc / tl.where(nothing, 1.0, l_i)[:, None]
    to = (out_row + row).to(tl.int64)
    out_ptr = (
        OUT
        + split.to(tl.int64) * stride_os
        + out_batch.to(tl.int64) * stride_ob
        + head * stride_oh
        + to * stride_ot
    )
    tl.store(
        out_ptr[:, None] + dv[None, :],
        out.to(OUT.dtype.element_ty),
        mask=real[:, None] & (dv < dim_v)[None, :],
    )
    if HAS_LSE:
        lse = tl.where(nothing, float("-inf"), (m_i + tl.log2(tl.where(nothing, 1.0, l_i))) * LN2)
        lse_ptr = (
            LSE
            + split.to(tl.int64) * stride_ls
            + out_batch.to(tl.int64) * stride_lb
            + head * stride_lh
            + to * stride_lt
        )
        tl.store(lse_ptr, lse, mask=real)


def call_arguments(x: Operands, part: Part, tile: Tile, stride: int = 1) -> GridAndArguments:
    """Grid and arguments of `attend_kernel`. Where out is `[splits, B, Hq, Tq, Dv]`, and lse alike,
    each of the `splits` programs leaves there what it makes of its part of the keys."""
    (tiles, arguments), kv = row_arguments(x, part, tile, stride), x.kv
    table, stride_table = kv.table()
    windows, sinks, positions = part.reads.windows, x.logits.sinks, x.logits.positions
    rows, lists = arguments["BLOCK_M"], arguments["lists"]
    of_out, of_lse = x.out.stride(), (0, 0, 0) if x.lse is None else x.lse.stride()
    splits = 1
    if x.out.ndim == 5:
        splits = x.out.shape[0]
    else:
        of_out, of_lse = (0, *of_out), (0, *of_lse)
    arguments |= dict(
        OUT=x.out, LSE=x.q if x.lse is None else x.lse, TABLE=table, stride_table=stride_table,
        WINDOWS=arguments["SEQUENCES"] if windows is None else windows,
        SINKS=x.q if sinks is None else sinks.contiguous(),
        **dict(zip(("stride_os", "stride_ob", "stride_oh", "stride_ot"), of_out, strict=False)),
        **dict(zip(("stride_ls", "stride_lb", "stride_lh", "stride_lt"), of_lse, strict=True)),
        kept=0 if windows is None else windows.stride(0), STRIDE=stride, SPLITS=splits,
        SAME_KV_STRIDES=kv.strides(kv.k) == kv.strides(kv.v), PAGE_SIZE=kv.page_size,
        KEPT_WINDOW=windows is not None, HAS_SINKS=sinks is not None, HAS_LSE=x.lse is not None,
        **rotation(positions, rows * stride + tile.keys, x.q),
    )  # fmt: skip
    return (tiles, lists * splits, part.sequences.count), arguments


def prefill(x: Operands, part: Part, stride: int = 1) -> None:
    """Attention of every query row of every sequence to what it reads.

    `stride` above 1: dense attention (`dense_reads`) of rows 0, `stride`, 2 `stride`, ... of every
    sequence (Delta Attention, arXiv 2505.11254). Then out is `[S, Hq, ceil(max_rows / stride),
    Dv]`, row `i` of sequence `s` belongs to its query row `i * stride`, and lse is alike.
    """
    grid, arguments = call_arguments(x, part, x.tile("prefill"), stride)
    attend_kernel[grid](**arguments)
