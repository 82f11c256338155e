"""The outliers of chunks, among the keys from which need is estimated (`farthest` in `methods/pyramid.py` is the readable twin).

They are found anew in every call that ranks rows: one pass over the keys, next to which a prompt's attention is long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hip_hf.kernels.addressing import KeyValues, token_offsets
from hip_hf.kernels.compiled import Launch
from hip_hf.kernels.examples import Example
from hip_hf.kernels.scoring import chunk_rows
from hip_hf.kernels.sequences import GROWING, Sequences, load_sequence
from hip_hf.kernels.summaries import blocks_needed
from hip_hf.kernels.tuning import power_of_two

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# Key blocks that a program looks at, one after another.
BLOCKS = 4
# The low half of an outlier's number: positions, turned round, so that the first of equally far keys counts as the farthest.
LOW_BITS = tl.constexpr(0xFFFFFFFF)


@triton.jit
def outlier_position(outlier):
    """Where the key lies that `outliers_kernel` numbers so."""
    return ((outlier & LOW_BITS) * -1 + LOW_BITS).to(tl.int32)


@triton.jit(do_not_specialize=[*GROWING, "stride_outliers"])
def outliers_kernel(
    outliers, k, block_table, sequences,
    stride_outliers, stride_kb, stride_kh, stride_kt, stride_table, stride_sequences, window, dim,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """`outliers` int64 `[S, Hkv, rows]`, of each block that a query block of the call may search: the squared distance of its
    farthest key from its mean, as the bits of a float, above that key's position. Grid: so many blocks, key heads, sequences."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    batch, key_start, _, rows, position = load_sequence(sequences, stride_sequences, sequence)
    needed = blocks_needed(rows, position, window, BLOCK_Q, BLOCK_K)
    to = outliers + (sequence * tl.num_programs(1) + head).to(tl.int64) * stride_outliers
    d, n = tl.arange(0, D), tl.arange(0, KEYS)
    for i in range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        at = block * BLOCK_K + n
        inside = (n < BLOCK_K) & (block < needed)
        there = inside[:, None] & (d < dim)[None, :]
        offset = token_offsets(key_start + at, inside, batch, stride_kb, stride_kt, block_table, stride_table, PAGE_SIZE)
        keys = tl.load(k + head.to(tl.int64) * stride_kh + offset[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        away = tl.where(there, keys - (tl.sum(keys, 0) / BLOCK_K)[None, :], 0.0)
        bits = tl.sum(away * away, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN has a sign
        number = (bits.to(tl.int64) << 32) | (at.to(tl.int64) * -1 + LOW_BITS)
        tl.store(to + chunk_rows(block, 0), tl.max(tl.where(inside, number, 0), 0), mask=block < needed)


def levels_of(config: HiPConfig, blocks: int) -> int:
    """The highest level that a sample of at most so many blocks can be of (`sample_level` in `methods/need.py`)."""
    level = 0
    while 2 * (blocks >> level) > config.method_options().sample:
        level += 1
    return level


def outlier_arguments(
    kv: KeyValues, sequences: Sequences, config: HiPConfig, block_q: int, dim: int, outliers: torch.Tensor
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `outliers_kernel`."""
    block_table, stride_table = kv.table()
    arguments = dict(
        outliers=outliers, k=kv.k, block_table=block_table, sequences=sequences.table, stride_outliers=outliers.stride(1),
        **dict(zip(("stride_kb", "stride_kh", "stride_kt"), kv.strides(kv.k), strict=True)),
        stride_table=stride_table, stride_sequences=sequences.table.stride(0), window=config.window, dim=dim,
        BLOCK_Q=block_q, BLOCK_K=config.block_k, BLOCKS=BLOCKS, KEYS=power_of_two(config.block_k), D=power_of_two(dim),
        PAGE_SIZE=kv.page_size, num_warps=4,
    )  # fmt: skip
    return (-(-(sequences.max_keys // config.block_k) // BLOCKS), kv.heads, sequences.count), arguments


def outliers_of(kv: KeyValues, sequences: Sequences, config: HiPConfig, block_q: int, dim: int) -> torch.Tensor:
    """Outliers int64 `[S, Hkv, rows]` of the chunks that a sample may be of: chunk `i` of level `l` in row
    `((2 * i + 1) << l) - 1`. Nothing is written where a middle is its own sample."""
    blocks = sequences.max_keys // config.block_k
    levels = levels_of(config, blocks)
    blocks = max(1, -(-blocks >> levels) << levels)
    outliers = torch.empty(sequences.count, kv.heads, 2 * blocks, dtype=torch.int64, device=kv.k.device)
    if sequences.max_keys <= config.method_options().sample:
        return outliers
    grid, arguments = outlier_arguments(kv, sequences, config, block_q, dim, outliers)
    outliers_kernel[grid](**arguments)
    for level in range(levels):  # of two halves the farther one; incomplete chunks are never read
        halves = outliers[..., (1 << level) - 1 :: 2 << level]
        torch.maximum(halves[..., 0::2], halves[..., 1::2], out=outliers[..., (2 << level) - 1 :: 4 << level])
    return outliers


def outlier_launch(x: Example) -> Launch:
    """What `hip-hf kernels` compiles for a call like `x`, with the default settings."""
    from hip_hf.config import HiPConfig

    outliers = torch.empty(1, x.kv.heads, 2, dtype=torch.int64, device=x.q.device)
    grid, arguments = outlier_arguments(x.kv, x.sequences, HiPConfig(), x.reads.block_q, x.q.shape[-1], outliers)
    return Launch(f"select, outliers{x.suffix}", outliers_kernel, arguments, False, grid)
