"""Triton kernels of the pyramid of outliers (`Outliers` in `methods/pyramid.py`): a chunk's mean and the keys farthest from it.

A distance needs the whole head dim, and a parent's outliers are among its children's; so chunks are made one by one, level by
level. The means are kept in fp32, laid out like the table; keys are copied as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.kernels.addressing import token_offsets
from hip_hf.kernels.scoring import chunk_rows
from hip_hf.kernels.sequences import GROWING, load_sequence
from hip_hf.kernels.summaries import blocks_needed


@triton.jit
def write_chunk(table, means, row, keys, present, mean, d, COUNT: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr):
    """Row `row`: `mean` `[BD]` and the `COUNT` of `keys` `[N, BD]` farthest from it; the mean again where there are fewer."""
    table += row.to(tl.int64) * ((1 + COUNT) * DIM)
    dtype = table.dtype.element_ty
    inside = d < DIM
    tl.store(means + row.to(tl.int64) * DIM + d, mean, mask=inside)
    tl.store(table + d, mean.to(dtype), mask=inside)
    off = tl.where(inside[None, :], keys - mean[None, :], 0.0)
    distance = tl.where(present, tl.sum(off * off, 1), -1.0)
    index = tl.arange(0, N)
    # [N, N]: distances once along either side
    other = tl.sum(tl.where(index[:, None] == index[None, :], distance[:, None], 0.0), 0)
    before = (other[None, :] > distance[:, None]) | ((other[None, :] == distance[:, None]) & (index[None, :] < index[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    chosen = present & (rank < COUNT)
    to = table + (1 + rank)[:, None] * DIM + d[None, :]
    tl.store(to, keys.to(dtype), mask=chosen[:, None] & inside[None, :])
    for slot in range(tl.sum(present.to(tl.int32), 0), COUNT):
        tl.store(table + (1 + slot) * DIM + d, mean.to(dtype), mask=inside)


@triton.jit
def make_chunk(
    table,
    means,
    k,
    level,
    index,
    key_start,
    batch,
    stride_kb,
    stride_kt,
    block_table,
    stride_table,
    d,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Chunk `index` of `level`: level 0 from keys, others from their halves. `N`: a power of two, no less than `BLOCK_K` and
    `2 * COUNT`."""
    i = tl.arange(0, N)
    inside = d < DIM
    if level == 0:
        present = i < BLOCK_K
        at = token_offsets(
            key_start + index * BLOCK_K + i, present, batch, stride_kb, stride_kt, block_table, stride_table, PAGE_SIZE
        )
        keys = tl.load(k + at[:, None] + d[None, :], mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        write_chunk(table, means, chunk_rows(index, 0), keys, present, tl.sum(keys, 0) / BLOCK_K, d, COUNT, N, DIM)
    else:
        left = chunk_rows(2 * index, level - 1).to(tl.int64)
        right = chunk_rows(2 * index + 1, level - 1).to(tl.int64)
        mean = tl.load(means + left * DIM + d, mask=inside, other=0.0)
        mean = (mean + tl.load(means + right * DIM + d, mask=inside, other=0.0)) * 0.5
        present = i < 2 * COUNT
        vector = tl.where(i < COUNT, left * (1 + COUNT) + 1 + i, right * (1 + COUNT) + 1 + i - COUNT)
        there = present[:, None] & inside[None, :]
        keys = tl.load(table + vector[:, None] * DIM + d[None, :], mask=there, other=0.0).to(tl.float32)
        write_chunk(table, means, chunk_rows(index, level), keys, present, mean, d, COUNT, N, DIM)


@triton.jit(do_not_specialize=GROWING)
def level_kernel(
    table,
    means,
    built,
    k,
    block_table,
    sequences,
    stride_sequence,
    stride_head,
    stride_mean_sequence,
    stride_mean_head,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_table,
    stride_field,
    window,
    level,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BD: tl.constexpr,
):
    """One chunk of `level`. Grid: chunks, key heads, sequences."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    batch, key_start, _, rows, position = load_sequence(sequences, stride_field, sequence)
    end = (index + 1) << level
    if end > blocks_needed(rows, position, window, BLOCK_Q, BLOCK_K):
        return
    if end <= tl.load(built + sequence * tl.num_programs(1) + head):
        return
    table += sequence.to(tl.int64) * stride_sequence + head.to(tl.int64) * stride_head
    means += sequence.to(tl.int64) * stride_mean_sequence + head.to(tl.int64) * stride_mean_head
    k += head.to(tl.int64) * stride_kh
    make_chunk(table, means, k, level, index, key_start, batch, stride_kb, stride_kt, block_table, stride_table, tl.arange(0, BD),
               COUNT, N, BLOCK_K, PAGE_SIZE, DIM)  # fmt: skip


@triton.jit(do_not_specialize=GROWING)
def append_outliers_kernel(
    table,
    means,
    built,
    k,
    block_table,
    sequences,
    stride_sequence,
    stride_head,
    stride_mean_sequence,
    stride_mean_head,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_table,
    stride_field,
    window,
    COUNT: tl.constexpr,
    N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BD: tl.constexpr,
    BUILD: tl.constexpr,
):
    """Extends one key head's pyramid from `built` to what the call needs, block by block (`BUILD`), or says that it is. Grid:
    key heads, sequences."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    batch, key_start, _, rows, position = load_sequence(sequences, stride_field, sequence)
    needed = blocks_needed(rows, position, window, BLOCK_Q, BLOCK_K)
    built += sequence * tl.num_programs(0) + head
    done = tl.load(built)
    if needed <= done:
        return
    if BUILD:
        table += sequence.to(tl.int64) * stride_sequence + head.to(tl.int64) * stride_head
        means += sequence.to(tl.int64) * stride_mean_sequence + head.to(tl.int64) * stride_mean_head
        k += head.to(tl.int64) * stride_kh
        for block in range(done, needed):
            level = 0
            while ((block + 1) >> level << level) == block + 1:
                index = ((block + 1) >> level) - 1
                make_chunk(table, means, k, level, index, key_start, batch, stride_kb, stride_kt, block_table, stride_table,
                           tl.arange(0, BD), COUNT, N, BLOCK_K, PAGE_SIZE, DIM)  # fmt: skip
                tl.debug_barrier()
                level += 1
    tl.store(built, needed)
