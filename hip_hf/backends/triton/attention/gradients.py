"""The two backward kernels, launched by `backward.py`. Reference: `backends/torch/backward.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.sequences import (
    GROWING,
    always_read,
    load_sequence,
    query_block,
    window_start,
)
from hip_hf.backends.triton.common.tiles import (
    key_positions,
    listed_blocks,
    scaled_with_slope,
    selected_keys,
)


@triton.jit(do_not_specialize=GROWING)
def query_gradient_kernel(
    Q, K, V, OUT, LSE, GRAD_OUT, GRAD_LSE, GRAD_Q, MEAN, INDICES, COUNTS, SEQUENCES,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb,
    stride_dqh, stride_dqt, stride_lb, stride_lh, stride_lt, stride_field,
    lists, blocks, most, sink_keys, window_keys, dim, dim_v, scale, softcap, sliding,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, LISTS_PER_HEAD: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, EVEN_HEADDIM: tl.constexpr, SELECTED: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    SOFTCAP: tl.constexpr, SLIDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid and tiles as `attend_kernel`'s. Also writes MEAN, `[B, Hq, Tq]` like LSE: sum(dO * O) -
    dLSE of each row, the mean of the weights' gradients that the softmax subtracts."""
    tile, head_list, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, key_start, row_start, rows, position = load_sequence(SEQUENCES, stride_field, sequence)
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    block = tile // TILES
    block_row, block_first, block_last = query_block(row_start, rows, position, block, BLOCK_Q)
    first = block_first + tile % TILES * BLOCK_M
    last = tl.minimum(first + BLOCK_M - 1, block_last)
    if first > last:
        return
    batch = batch.to(tl.int64)

    m = tl.arange(0, BLOCK_M * GROUP_PADDED)
    row, member = m // GROUP_PADDED, m % GROUP_PADDED
    row_at = first + row
    real = (row_at <= last) & (member < GROUP)
    head = (head_list * GROUP + member).to(tl.int64)
    at = (block_row + tile % TILES * BLOCK_M + row).to(tl.int64)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    in_d, in_dv = real[:, None] & (d < dim)[None, :], real[:, None] & (dv < dim_v)[None, :]
    q = tl.load(
        Q + (batch * stride_qb + head * stride_qh + at * stride_qt)[:, None] + d[None, :],
        mask=in_d,
        other=0.0,
    )
    do_ptr = (
        GRAD_OUT + (batch * stride_gb + head * stride_gh + at * stride_gt)[:, None] + dv[None, :]
    )
    grad_out = tl.load(do_ptr, mask=in_dv, other=0.0)
    out = tl.load(
        OUT + (batch * stride_ob + head * stride_oh + at * stride_ot)[:, None] + dv[None, :],
        mask=in_dv,
        other=0.0,
    )
    by_row = batch * stride_lb + head * stride_lh + at * stride_lt
    lse = tl.load(LSE + by_row, mask=real, other=0.0)
    mean = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        mean -= tl.load(GRAD_LSE + by_row, mask=real, other=0.0)
    tl.store(MEAN + by_row, mean, mask=real)

    start, sink, window = always_read(
        block_first, window_start(block_first, window_keys, BLOCK_K), sink_keys, sliding, BLOCK_K
    )
    sink_len = sink - start
    ids, picked = selected_keys(
        INDICES, COUNTS, sequence, head_list, block, lists, blocks, most, BLOCK_K, SELECTED
    )
    before = sink_len + picked - window
    clear, end = (before + first + 1) // BLOCK_N, before + last + 1
    if SLIDING:
        clear = 0
    tiles = (end + BLOCK_N - 1) // BLOCK_N

    key_head = (head_list // LISTS_PER_HEAD).to(tl.int64)
    k_base, v_base = (
        K + batch * stride_kb + key_head * stride_kh,
        V + batch * stride_vb + key_head * stride_vh,
    )
    acc = tl.zeros([BLOCK_M * GROUP_PADDED, D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    # as in `prefill.py`, the blocks of a tile are looked up two tiles ahead, and slots after the
    # last one repeat it
    blocks = listed_blocks(tl.minimum(n, end - 1), ids, sink_len, picked, BLOCK_K)
    position = key_positions(
        tl.minimum(n, end - 1), blocks, start, sink_len, picked, window, BLOCK_K
    )
    blocks = listed_blocks(tl.minimum(BLOCK_N + n, end - 1), ids, sink_len, picked, BLOCK_K)
    for i in range(0, tiles):
        slots = i * BLOCK_N + n
        token = (key_start + position).to(tl.int64)
        k_ptr, v_ptr = (
            k_base + (token * stride_kt)[:, None] + d[None, :],
            v_base + (token * stride_vt)[:, None] + dv[None, :],
        )
        if EVEN_HEADDIM:
            k = tl.load(k_ptr)
            v = tl.load(v_ptr)
        else:
            k = tl.load(k_ptr, mask=(d < dim)[None, :], other=0.0)
            v = tl.load(v_ptr, mask=(dv < dim_v)[None, :], other=0.0)
        logits, slope = scaled_with_slope(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP
        )
        weights = tl.exp(logits - lse[:, None])
        if i >= clear:
            seen = slots[None, :] <= (before + row_at)[:, None]
            if SLIDING:
                seen &= position[None, :] > row_at[:, None] - sliding
            weights = tl.where(seen, weights, 0.0)
        grad = weights * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        if SOFTCAP:
            grad = grad * slope
        acc = tl.dot(grad.to(k.dtype), k, acc, input_precision=PRECISION)
        position = key_positions(
            tl.minimum(slots + BLOCK_N, end - 1), blocks, start, sink_len, picked, window, BLOCK_K
        )
        blocks = listed_blocks(
            tl.minimum(slots + 2 * BLOCK_N, end - 1), ids, sink_len, picked, BLOCK_K
        )
    to = GRAD_Q + (batch * stride_dqb + head * stride_dqh + at * stride_dqt)[:, None] + d[None, :]
    tl.store(to, (acc * scale).to(GRAD_Q.dtype.element_ty), mask=in_d)


@triton.jit
def _key_gradients(
    grad_k, grad_v, k, v, Q, GRAD_OUT, LSE, MEAN, batch, head_list, first, last, row, n, key, bits,
    row_offset, position, sink_keys, window_keys,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt, stride_lb, stride_lh,
    stride_lt, scale, softcap, sliding, dim, dim_v, member,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SOFTCAP: tl.constexpr, SLIDING: tl.constexpr, CHOSEN: tl.constexpr,
    OF_K: tl.constexpr, OF_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (not yet scaled) and dV of a tile of keys after one more tile of query rows, at positions
    `first` to `last`.

    CHOSEN: the rows are of a query block that selected the key blocks in `bits`. Otherwise they
    read the keys only as sink or window.
    """
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    row_at = first + row
    real = (row_at <= last) & (member < GROUP)
    head = (head_list * GROUP + member).to(tl.int64)
    at = (row_offset + row_at).to(tl.int64)
    q_ptr = Q + (batch * stride_qb + head * stride_qh + at * stride_qt)[:, None] + d[None, :]
    q = tl.load(q_ptr, mask=real[:, None] & (d < dim)[None, :], other=0.0)
    do_ptr = (
        GRAD_OUT + (batch * stride_gb + head * stride_gh + at * stride_gt)[:, None] + dv[None, :]
    )
    grad_out = tl.load(do_ptr, mask=real[:, None] & (dv < dim_v)[None, :], other=0.0)
    by_row = batch * stride_lb + head * stride_lh + at * stride_lt
    lse = tl.load(LSE + by_row, mask=real, other=0.0)
    mean = tl.load(MEAN + by_row, mask=real, other=0.0)

    if CHOSEN:
        read = ((bits >> tl.minimum(n // BLOCK_K, 31)) & 1) == 1
        seen = read[:, None] & real[None, :]
    else:
        block_at = tl.maximum(row_at // BLOCK_Q * BLOCK_Q, position)
        start, sink, window = always_read(
            block_at, window_start(block_at, window_keys, BLOCK_K), sink_keys, sliding, BLOCK_K
        )
        seen = ((key[:, None] < sink[None, :]) & (key[:, None] >= start[None, :])) | (
            key[:, None] >= window[None, :]
        )
        seen &= (key[:, None] <= row_at[None, :]) & real[None, :]
    if SLIDING:
        seen &= key[:, None] > row_at[None, :] - sliding

    logits, slope = scaled_with_slope(
        tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, SOFTCAP
    )
    weights = tl.where(seen, tl.exp(logits - lse[None, :]), 0.0)  # [BLOCK_N, M]
    if OF_V:
        grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
    if OF_K:
        grad = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - mean[None, :])
        if SOFTCAP:
            grad = grad * slope
        grad_k = tl.dot(grad.to(k.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=GROWING)
def key_gradient_kernel(
    Q, K, V, LSE, GRAD_OUT, MEAN, GRAD_K, GRAD_V, WHO, WHAT, OFFSETS, SEQUENCES,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb,
    stride_dvh, stride_dvt, stride_lb, stride_lh, stride_lt, stride_field,
    lists, sink_keys, window_keys, dim, dim_v, scale, softcap, sliding,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    LISTS_PER_HEAD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SELECTED: tl.constexpr,
    SOFTCAP: tl.constexpr, SLIDING: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles of TILE <= BLOCK_N keys, Hkv, sequences)`. Adds to GRAD_K `[B, Hkv, T, D]` and
    GRAD_V `[B, Hkv, T, Dv]`, which only this program writes; OF_K and OF_V tell which, as both sums
    of a wide head are more than the registers hold. A tile is whole key blocks, or one of the PARTS
    of one. The other tensors are as in `backward.py`."""
    tile, key_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, key_start, row_start, rows, position = load_sequence(SEQUENCES, stride_field, sequence)
    end = position + rows
    if PARTS > 1:
        low = tile // PARTS * BLOCK_K + tile % PARTS * TILE
        high = (tile // PARTS + 1) * BLOCK_K  # rows read whole blocks
    else:
        low = tile * TILE
        high = low + TILE
    if (low >= end) | (rows == 0):
        return
    batch = batch.to(tl.int64)
    n, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, D), tl.arange(0, DV)
    m = tl.arange(0, BLOCK_M * GROUP_PADDED)
    row, member = m // GROUP_PADDED, m % GROUP_PADDED
    key = low + n
    real = (n < TILE) & (key < end)
    if PARTS > 1:
        real &= key < high
    key = tl.where(real, key, end)  # no row sees it
    at = (key_start + key).to(tl.int64)
    in_d, in_dv = real[:, None] & (d < dim)[None, :], real[:, None] & (dv < dim_v)[None, :]
    k_ptr = (
        K
        + (batch * stride_kb + key_head.to(tl.int64) * stride_kh + at * stride_kt)[:, None]
        + d[None, :]
    )
    v_ptr = (
        V
        + (batch * stride_vb + key_head.to(tl.int64) * stride_vh + at * stride_vt)[:, None]
        + dv[None, :]
    )
    k, v = tl.load(k_ptr, mask=in_d, other=0.0), tl.load(v_ptr, mask=in_dv, other=0.0)
    grad_k, grad_v = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, DV], tl.float32)

    # Rows that read the tile as sink or window: from the first that sees it to the last whose
    # window reaches back to it.
    until = tl.minimum((high + window_keys + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q, end)
    if low < (sink_keys + BLOCK_K - 1) // BLOCK_K * BLOCK_K:
        until = end
    if SLIDING:
        until = tl.minimum(until, high + sliding)
    since = tl.maximum(low, position)
    count = tl.maximum(until - since + BLOCK_M - 1, 0) // BLOCK_M
    TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    for part in range(LISTS_PER_HEAD):
        head_list = key_head * LISTS_PER_HEAD + part
        for i in tl.range(0, count, disable_licm=True):
            first = since + i * BLOCK_M
            grad_k, grad_v = _key_gradients(
                grad_k, grad_v, k, v, Q, GRAD_OUT, LSE, MEAN, batch, head_list, first, until - 1,
                row, n, key, 0, row_start - position, position, sink_keys, window_keys,
                stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt, stride_lb,
                stride_lh, stride_lt, scale, softcap, sliding, dim, dim_v, member,
                BLOCK_Q, BLOCK_K, GROUP, D, DV, SOFTCAP, SLIDING, False, OF_K, OF_V, PRECISION,
            )  # fmt: skip
        if SELECTED:
            entry = (sequence * lists + head_list).to(tl.int64) * (
                tl.num_programs(0) // PARTS
            ) + tile // PARTS
            begin, stop = tl.load(OFFSETS + entry), tl.load(OFFSETS + entry + 1)
            for i in tl.range(0, ((stop - begin) * TILES).to(tl.int32), disable_licm=True):
                who, bits = tl.load(WHO + begin + i // TILES), tl.load(WHAT + begin + i // TILES)
                _, block_first, block_last = query_block(row_start, rows, position, who, BLOCK_Q)
                first = block_first + i % TILES * BLOCK_M
                grad_k, grad_v = _key_gradients(
                    grad_k, grad_v, k, v, Q, GRAD_OUT, LSE, MEAN, batch, head_list, first,
                    block_last, row, n, key, bits,
                    row_start - position, position, sink_keys, window_keys,
                    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt, stride_lb,
                    stride_lh, stride_lt, scale, softcap, sliding, dim, dim_v, member,
                    BLOCK_Q, BLOCK_K, GROUP, D, DV, SOFTCAP, SLIDING, True, OF_K, OF_V, PRECISION,
                )  # fmt: skip
    if OF_K:
        dk_ptr = (
            GRAD_K
            + (batch * stride_dkb + key_head.to(tl.int64) * stride_dkh + at * stride_dkt)[:, None]
            + d[None, :]
        )
        grad_k = grad_k * scale + tl.load(dk_ptr, mask=in_d, other=0.0).to(tl.float32)
        tl.store(dk_ptr, grad_k.to(GRAD_K.dtype.element_ty), mask=in_d)
    if OF_V:
        dv_ptr = (
            GRAD_V
            + (batch * stride_dvb + key_head.to(tl.int64) * stride_dvh + at * stride_dvt)[:, None]
            + dv[None, :]
        )
        grad_v = grad_v + tl.load(dv_ptr, mask=in_dv, other=0.0).to(tl.float32)
        tl.store(dv_ptr, grad_v.to(GRAD_V.dtype.element_ty), mask=in_dv)
