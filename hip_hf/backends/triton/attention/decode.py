"""Attention of few query rows over many keys, split over the keys: decode, and the dense tail of a
prefill call.

The prefill kernel runs with `SPLITS` programs per tile of rows, each over its share of the keys
that the row reads, and leaves partial outputs and log-sum-exps in scratch; `combine_kernel` merges
them. Grids depend on shapes alone and lengths are read on the device, so a step can be captured in
a CUDA graph and replayed as the sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_hf.backends.triton.attention.prefill import attend_kernel, call_arguments
from hip_hf.backends.triton.common.arguments import (
    GridAndArguments,
    Operands,
    Part,
    rows_of_program,
)
from hip_hf.backends.triton.common.sequences import GROWING, Sequences, load_sequence
from hip_hf.backends.triton.common.tiles import LN2, LOG2E
from hip_hf.backends.triton.common.tuning import Tile, power_of_two, processors, tile_for

# Parts into which the keys of a row are split at most, a power of two: what one program of the
# combine step takes.
MOST_SPLITS = 64


def kernel_of(block_q: int) -> str:
    """Name in the table of launches: rows with a selection each, or query blocks of them."""
    return "decode" if block_q == 1 else "prefill"


@dataclass(frozen=True)
class DecodeScratch:
    """Partial results of every split: out fp32 `[splits, B, Hq, Tq, Dv]`, lse fp32
    `[splits, B, Hq, Tq]`."""

    out: Tensor
    lse: Tensor

    @staticmethod
    def make(splits: int, q: Tensor, dim_v: int) -> DecodeScratch:
        """For queries like `q` `[B, Hq, Tq, D]`; its size does not grow with the number of keys."""
        shape = (splits, *q.shape[:3])
        return DecodeScratch(
            torch.empty(*shape, dim_v, dtype=torch.float32, device=q.device),
            torch.empty(shape, dtype=torch.float32, device=q.device),
        )


def splits_for(
    q: Tensor, key_heads: int, sequences: int, keys: int, rows: int = 1, block_q: int = 1
) -> int:
    """Return the number of parts into which the `keys` that a row reads are split (dense: the
    capacity of the cache). It is a power of two, enough to occupy the device, but no part is below
    one tile. q is `[B, Hq, Tq, D]`; `rows` are those of the longest sequence, in query blocks of
    `block_q`."""
    tile, group = tile_for(kernel_of(block_q), q, q.shape[-1]), q.shape[1] // key_heads
    return splits_of(tile, group, sequences * key_heads, keys, rows, block_q, processors(q))


def splits_of(
    tile: Tile, group: int, heads: int, keys: int, rows: int, block_q: int, at_once: int
) -> int:
    """The same, for groups of `group` query heads, `heads` key heads and `at_once` processors."""
    programs = heads * -(-rows // min(block_q, rows_of_program(tile, group, block_q)))
    most = min(MOST_SPLITS, -(-keys // tile.keys), max(1, 2 * at_once // programs))
    return 1 << (most.bit_length() - 1)


@triton.jit(do_not_specialize=GROWING)
def combine_kernel(
    PARTS, PART_LSE, OUT, LSE, SEQUENCES,
    stride_ps, stride_pb, stride_ph, stride_pt, stride_ms, stride_mb, stride_mh, stride_mt,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_field, dim_v,
    SPLITS: tl.constexpr, DV: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Grid `(most rows, Hq, sequences)`: merge the partial results of one row of one head, PARTS
    fp32 `[SPLITS, B, Hq, Tq, Dv]` and PART_LSE fp32 `[SPLITS, B, Hq, Tq]`, into OUT
    `[B, Hq, Tq, Dv]` and LSE fp32 `[B, Hq, Tq]`."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, _, row_start, rows, _ = load_sequence(SEQUENCES, stride_field, tl.program_id(2))
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
    scratch: DecodeScratch, sequences: Sequences, out: Tensor, lse: Tensor | None
) -> GridAndArguments:
    """Grid and arguments of `combine_kernel`, which writes out `[B, Hq, Tq, Dv]` and, if there is
    one, lse fp32 `[B, Hq, Tq]`."""
    dim_v, of_lse = out.shape[-1], (0, 0, 0) if lse is None else lse.stride()
    parts, part_lse = scratch.out, scratch.lse
    of_parts, of_part_lse = parts.stride(), part_lse.stride()
    arguments = dict(
        PARTS=parts, PART_LSE=part_lse, OUT=out, LSE=part_lse if lse is None else lse,
        **dict(zip(("stride_ps", "stride_pb", "stride_ph", "stride_pt"), of_parts, strict=False)),
        **dict(zip(("stride_ms", "stride_mb", "stride_mh", "stride_mt"), of_part_lse, strict=True)),
        **dict(zip(("stride_ob", "stride_oh", "stride_ot"), out.stride(), strict=False)),
        **dict(zip(("stride_lb", "stride_lh", "stride_lt"), of_lse, strict=True)),
        SEQUENCES=sequences.table, stride_field=sequences.table.stride(0), dim_v=dim_v,
        SPLITS=parts.shape[0], DV=power_of_two(dim_v), HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
    return (sequences.max_rows, out.shape[1], sequences.count), arguments


def decode(x: Operands, part: Part, scratch: DecodeScratch) -> None:
    """As `prefill`, but with the keys of each row split over as many programs as `scratch` has room
    for (`splits_for`).

    With a `block_q` of 1 every row has its own selection; with `dense_reads(1)` a row reads every
    key. `Reads.windows` holds the start of each row's window where a selection is older than the
    row.
    """
    split = scratch.out.shape[0] > 1
    into = Operands(x.q, x.kv, x.logits, scratch.out, scratch.lse) if split else x
    grid, arguments = call_arguments(into, part, x.tile(kernel_of(part.reads.block_q)))
    attend_kernel[grid](**arguments)
    if split:
        grid, arguments = combine_arguments(scratch, part.sequences, x.out, x.lse)
        combine_kernel[grid](**arguments)


def decode_once(x: Operands, part: Part, keys: int) -> None:
    """`decode` where no scratch is kept, of rows that read up to `keys` keys."""
    count, rows = part.sequences.count, part.sequences.max_rows
    splits = splits_for(x.q, x.kv.heads, count, keys, rows, part.reads.block_q)
    decode(x, part, DecodeScratch.make(splits, x.q, x.kv.v.shape[-1]))
