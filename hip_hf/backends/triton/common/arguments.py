"""What the kernels are told of a call: its tensors, what rows read, how products become logits, and
the arguments that several kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.common.tuning import Tile, power_of_two, precision_of, tile_for
from hip_hf.rope import Positions

# A window that reaches back to the first key of any sequence: dense attention.
EVERYTHING = 2**30
# A launch: its grid, and the kernel's arguments by name.
GridAndArguments = tuple[tuple[int, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Reads:
    """What every query row reads.

    `indices` int32 `[S, H', Nq, n]`: sorted key blocks between sink and window, of which `counts`
    int32 `[S, H', Nq]` count; `H'` is Hkv where the group shares a selection, else Hq; None: sink
    and window only. `sink` and `window` in keys. `windows` int32 `[S, Nq]`, rows at any stride:
    where the window starts, if it is not laid out anew (decode between refreshes).
    """

    block_q: int
    block_k: int
    sink: int
    window: int
    indices: Tensor | None = None
    counts: Tensor | None = None
    windows: Tensor | None = None


@dataclass(frozen=True)
class Logits:
    """How products become logits. `sinks` `[Hq]`: one extra logit per query head. `positions`: q
    and k are not rotated."""

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None
    positions: Positions | None = None


def dense_reads(block_q: int = 64) -> Reads:
    """Every key up to the row itself."""
    return Reads(block_q, 16, 0, EVERYTHING)


def configuration(kernel: str, logits: Logits) -> str:
    """Name in the table of launches. To rotate a tile of queries or keys takes four times the
    registers of its numbers, so extended calls have launches of their own."""
    return kernel if logits.positions is None else f"{kernel} extended"


def rows_of_program(tile: Tile, group: int, block_q: int) -> int:
    """Query rows of a program that attends for `group` heads of each; tensor cores take 16 rows
    times heads at least."""
    padded = power_of_two(group)
    return max(min(tile.rows // padded, power_of_two(block_q)), 16 // padded, 1)


@dataclass
class Operands:
    """What attention is computed of, and where it is written.

    q: `[B, Hq, Tq, D]`, any strides but 1 in the last; fp16, bf16 or fp32. kv: keys
    `[B, Hkv, T, D]` and values `[B, Hkv, T, Dv]` of q's dtype, or pages of them. out:
    `[B, Hq, Tq, Dv]`, q's dtype or fp32; rows outside every sequence are left as they are, as are
    those of lse. lse: fp32 `[B, Hq, Tq]`, natural logarithm, sinks included.
    """

    q: Tensor
    kv: KeyValues
    logits: Logits
    out: Tensor
    lse: Tensor | None = None

    def tile(self, kernel: str) -> Tile:
        """The configuration of `kernel` (a name in the table of launches) for heads like these."""
        return tile_for(configuration(kernel, self.logits), self.q, self.kv.v.shape[-1])


@dataclass(frozen=True)
class Part:
    """Some rows of a call, and what they read: those that select, or the dense ones after them."""

    sequences: Sequences
    reads: Reads


def shared_arguments(x: Operands, part: Part, tile: Tile, stride: int = 1) -> dict[str, Any]:
    """Arguments of all kernels that meet query rows with keys, forward and backward."""
    q, kv, logits, reads, sequences = x.q, x.kv, x.logits, part.reads, part.sequences.table
    lists = kv.heads if reads.indices is None else reads.indices.shape[1]
    group, dim, dim_v = q.shape[1] // lists, q.shape[-1], kv.v.shape[-1]
    return dict(
        Q=q, K=kv.k, V=kv.v, SEQUENCES=sequences, stride_field=sequences.stride(0),
        **dict(zip(("stride_qb", "stride_qh", "stride_qt"), q.stride(), strict=False)),
        **dict(zip(("stride_kb", "stride_kh", "stride_kt"), kv.strides(kv.k), strict=True)),
        **dict(zip(("stride_vb", "stride_vh", "stride_vt"), kv.strides(kv.v), strict=True)),
        lists=lists, sink_keys=reads.sink, window_keys=reads.window, dim=dim, dim_v=dim_v,
        scale=logits.scale, softcap=logits.softcap or 1.0, sliding=logits.sliding_window or 0,
        BLOCK_Q=reads.block_q, BLOCK_K=reads.block_k, BLOCK_N=tile.keys,
        BLOCK_M=rows_of_program(tile, group, reads.block_q if stride == 1 else tile.rows),
        GROUP=group, GROUP_PADDED=power_of_two(group), LISTS_PER_HEAD=lists // kv.heads,
        D=max(16, power_of_two(dim)), DV=max(16, power_of_two(dim_v)),
        SELECTED=reads.indices is not None, SOFTCAP=logits.softcap is not None,
        SLIDING=logits.sliding_window is not None, PRECISION=precision_of(q),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def row_arguments(
    x: Operands, part: Part, tile: Tile, stride: int = 1
) -> tuple[int, dict[str, Any]]:
    """The tiles of a sequence's query rows, or of those at a `stride`, and the arguments of the
    kernels in which such a tile walks what it reads."""
    shared, indices = shared_arguments(x, part, tile, stride), part.reads.indices
    nothing = part.sequences.table  # stands for what is not read
    shared["INDICES"] = nothing if indices is None else indices
    shared["COUNTS"] = nothing if part.reads.counts is None else part.reads.counts
    shared["blocks"], shared["most"] = (0, 0) if indices is None else indices.shape[2:]
    shared["EVEN_HEADDIM"] = (shared["D"], shared["DV"]) == (shared["dim"], shared["dim_v"])
    rows, block_q = shared["BLOCK_M"], part.reads.block_q
    if stride > 1:
        return -(-part.sequences.max_rows // (stride * rows)), shared
    return part.sequences.blocks(block_q) * -(-block_q // rows), shared
