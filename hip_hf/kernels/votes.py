"""Pooled votes of query blocks, so many rows to a vote (`pooled` in `methods/hip.py` is the readable twin)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hip_hf.kernels.compiled import Launch, Pointer
from hip_hf.kernels.sequences import Sequences, load_sequence, query_block


@triton.jit
def pool_kernel(
    q, sequences, votes, stride_qb, stride_qh, stride_qt, stride_field, eps,
    BLOCK_Q: tl.constexpr, STRIDE: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The votes of one query block, one head and one sequence. Grid: query blocks, query heads, sequences."""
    index, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, _, row_start, rows, position = load_sequence(sequences, stride_field, sequence)
    last_row, first, last = query_block(row_start, rows, position, index, BLOCK_Q)
    if first > last:
        return
    last_row += last - first
    q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    entry = (sequence * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + index
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    count = (last - first) // STRIDE + 1
    for vote in range(count):
        back = (count - 1 - vote) * STRIDE + row
        inside = (row < STRIDE) & (back <= last - first)
        at = (last_row - tl.where(inside, back, 0)).to(tl.int64) * stride_qt
        x = tl.load(q + at[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
        pooled = tl.sum(inside.to(tl.float32), 0)
        mean = tl.sum(x, 0) / pooled
        length = tl.sum(tl.sqrt(tl.sum(x * x, 1)), 0) / pooled
        own = tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), eps * length)  # rows may cancel out
        x = mean * tl.where(own > 0, length / own, 0.0)
        tl.store(votes + (entry * SAMPLES + vote) * DIM + d, x, mask=d < DIM)


def constants(block_q: int, query_stride: int, dim: int) -> dict[str, int]:
    return dict(
        BLOCK_Q=block_q, STRIDE=query_stride, SAMPLES=-(-block_q // query_stride), ROWS=triton.next_power_of_2(query_stride),
        DIM=dim, WIDTH=triton.next_power_of_2(dim),
    )  # fmt: skip


def pool(q: torch.Tensor, sequences: Sequences, block_q: int, query_stride: int) -> torch.Tensor:
    """Votes `[S, Hq, blocks * ceil(block_q / query_stride), D]` of the query blocks of q `[B, Hq, Tq, D]`, in its dtype. The
    votes of a block with fewer rows are the first of its places; the others are not written."""
    fixed = constants(block_q, query_stride, q.shape[-1])
    blocks = sequences.blocks(block_q)
    votes = q.new_empty(sequences.count, q.shape[1], blocks * fixed["SAMPLES"], q.shape[-1])
    eps = torch.finfo(torch.float32).eps
    pool_kernel[(blocks, q.shape[1], sequences.count)](
        q, sequences.table, votes, *q.stride()[:3], sequences.table.stride(0), eps, **fixed
    )
    return votes


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """With the default settings, over a contiguous prompt; the same on every target."""
    from hip_hf.config import HiPConfig

    config = HiPConfig()
    pointers = {"q": Pointer(dtype), "votes": Pointer(dtype), "sequences": Pointer(torch.int32)}
    numbers = dict(stride_qb=32 * 4096 * dim, stride_qh=4096 * dim, stride_qt=dim, stride_field=1, eps=1e-7)
    fixed = constants(config.block_q, config.query_stride, dim)
    return [Launch("select, votes", pool_kernel, {**pointers, **numbers, **fixed})]
