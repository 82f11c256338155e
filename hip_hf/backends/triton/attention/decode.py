"""Attention of few query rows over many keys, split over the keys: decode, and the dense tail of a
prefill call.

The prefill kernel runs with `SPLITS` programs per tile of rows, each over its share of the keys
that the row reads, and leaves partial outputs and log-sum-exps in scratch; `combine_kernel` merges
them. Grids depend on shapes alone and lengths are read on the device, so a step can be captured in
a CUDA graph and replayed as the sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hip_hf.backends.triton.attention.prefill import attend_kernel, call_arguments
from hip_hf.backends.triton.common.addressing import KeyValues
from hip_hf.backends.triton.common.arguments import Logits, Reads, configuration, rows_of
from hip_hf.backends.triton.common.sequences import GROWING, Sequences, load_sequence
from hip_hf.backends.triton.common.tiles import LN2, LOG2E
from hip_hf.backends.triton.common.tuning import (
    MOST_SPLITS,
    Tile,
    power_of_two,
    processors,
    target_of,
    tile_of,
)


def kernel_of(block_q: int) -> str:
    """Name in the table of launches: rows with a selection each, or query blocks of them."""
    return "decode" if block_q == 1 else "prefill"


@dataclass(frozen=True)
class Scratch:
    """Partial results of every split: out fp32 `[splits, B, Hq, Tq, Dv]`, lse fp32
    `[splits, B, Hq, Tq]`."""

    out: torch.Tensor
    lse: torch.Tensor

    @staticmethod
    def make(splits: int, q: torch.Tensor, dim_v: int) -> Scratch:
        """For queries like `q` `[B, Hq, Tq, D]`; its size does not grow with the number of keys."""
        shape = (splits, *q.shape[:3])
        return Scratch(
            torch.empty(*shape, dim_v, dtype=torch.float32, device=q.device),
            torch.empty(shape, dtype=torch.float32, device=q.device),
        )


def splits_for(
    q: torch.Tensor, key_heads: int, sequences: int, keys: int, rows: int = 1, block_q: int = 1
) -> int:
    """Into how many parts to split the `keys` that a row reads (dense: the capacity of the cache),
    a power of two: enough to occupy the device, but no part below one tile. `rows`: of the longest
    sequence, in query blocks of `block_q`."""
    tile = tile_of(kernel_of(block_q), target_of(q), q.shape[-1], q.shape[-1], q.dtype)
    return splits_of(
        tile, q.shape[1] // key_heads, sequences * key_heads, keys, rows, block_q, processors(q)
    )


def splits_of(
    tile: Tile, group: int, heads: int, keys: int, rows: int, block_q: int, at_once: int
) -> int:
    """The same of a tile for `group` query heads, of so many key `heads` in all, on a device with
    `at_once` processors."""
    programs = heads * -(-rows // min(block_q, rows_of(tile, group, block_q)))
    most = min(MOST_SPLITS, -(-keys // tile.keys), max(1, 2 * at_once // programs))
    return 1 << (most.bit_length() - 1)


@triton.jit(do_not_specialize=GROWING)
def combine_kernel(
    PARTS, PART_LSE, OUT, LSE, SEQUENCES,
    stride_ps, stride_pb, stride_ph, stride_pt, stride_ms, stride_mb, stride_mh, stride_mt,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_sequences, dim_v,
    SPLITS: tl.constexpr, DV: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Grid `(most rows, Hq, sequences)`: merge the partial results of one row of one head."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, _, row_start, rows, _ = load_sequence(SEQUENCES, stride_sequences, tl.program_id(2))
    if row >= rows:
        return
    batch, to = batch.to(tl.int64), (row_start + row).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DV)
    lse = tl.load(
        PART_LSE + split * stride_ms + batch * stride_mb + head * stride_mh + to * stride_mt
    )
    parts_ptr = (
        PARTS
        + split.to(tl.int64) * stride_ps
        + batch * stride_pb
        + head * stride_ph
        + to * stride_pt
    )
    parts = tl.load(parts_ptr[:, None] + d[None, :], mask=(d < dim_v)[None, :], other=0.0)
    m_i = tl.max(lse, 0)
    base = tl.where(m_i == float("-inf"), 0.0, m_i)
    weights = tl.exp2((lse - base) * LOG2E)
    l_i = tl.sum(weights, 0)
    nothing = l_i == 0.0
    out = tl.sum(parts * weights[:, None], 0) / tl.where(nothing, 1.0, l_i)
    out_ptr = OUT + batch * stride_ob + head * stride_oh + to * stride_ot + d
    tl.store(out_ptr, out.to(OUT.dtype.element_ty), mask=d < dim_v)
    if HAS_LSE:
        merged = tl.where(nothing, float("-inf"), base + tl.log2(tl.where(nothing, 1.0, l_i)) * LN2)
        tl.store(LSE + batch * stride_lb + head * stride_lh + to * stride_lt, merged)


def combine_arguments(
    scratch: Scratch, sequences: Sequences, out: torch.Tensor, lse: torch.Tensor | None
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of `combine_kernel`."""
    dim_v = out.shape[-1]
    arguments = dict(
        PARTS=scratch.out, PART_LSE=scratch.lse, OUT=out, LSE=scratch.lse if lse is None else lse, SEQUENCES=sequences.table,
        **dict(zip(("stride_ps", "stride_pb", "stride_ph", "stride_pt"), scratch.out.stride(), strict=False)),
        **dict(zip(("stride_ms", "stride_mb", "stride_mh", "stride_mt"), scratch.lse.stride(), strict=True)),
        **dict(zip(("stride_ob", "stride_oh", "stride_ot"), out.stride(), strict=False)),
        **dict(zip(("stride_lb", "stride_lh", "stride_lt"), (0, 0, 0) if lse is None else lse.stride(), strict=True)),
        stride_sequences=sequences.table.stride(0), dim_v=dim_v,
        SPLITS=scratch.out.shape[0], DV=power_of_two(dim_v), HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
    return (sequences.max_rows, out.shape[1], sequences.count), arguments


def decode(
    q: torch.Tensor,
    kv: KeyValues,
    sequences: Sequences,
    reads: Reads,
    logits: Logits,
    scratch: Scratch,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """As `prefill`, but with the keys of each row split over as many programs as `scratch` has room
    for (`splits_for`).

    With `reads.block_q` 1 every row has its own selection; with `dense_reads(1)` a row reads every
    key. `reads.windows` holds the start of each row's window where a selection is older than the
    row.
    """
    splits = scratch.out.shape[0]
    target, dim, dim_v = target_of(q), q.shape[-1], kv.v.shape[-1]
    tile = tile_of(configuration(kernel_of(reads.block_q), logits), target, dim, dim_v, q.dtype)
    if splits == 1:
        grid, arguments = call_arguments(q, kv, sequences, reads, logits, out, lse, tile)
        attend_kernel[grid](**arguments)
        return
    grid, arguments = call_arguments(
        q, kv, sequences, reads, logits, scratch.out, scratch.lse, tile, splits
    )
    attend_kernel[grid](**arguments)
    grid, arguments = combine_arguments(scratch, sequences, out, lse)
    combine_kernel[grid](**arguments)


def decode_once(
    q: torch.Tensor,
    kv: KeyValues,
    sequences: Sequences,
    reads: Reads,
    logits: Logits,
    keys: int,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """`decode` where no scratch is kept, of rows that read up to `keys` keys."""
    splits = splits_for(q, kv.heads, sequences.count, keys, sequences.max_rows, reads.block_q)
    decode(q, kv, sequences, reads, logits, Scratch.make(splits, q, kv.v.shape[-1]), out, lse)
