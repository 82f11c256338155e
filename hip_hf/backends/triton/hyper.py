"""HyperAttention on a GPU (arXiv 2310.05869): hashing, and the squares of a level in one launch.
Reference: `torch/hyper.py`.

The exact leaves are short causal prompts, so the prefill kernel computes them; sorting by hash is
`torch.sort`, a radix sort of few bits. What is left is here: a kernel that hashes rows as it reads
them once, and one that attends from sorted rows to the keys of their own block and to the sample,
gathered through the order without a sorted copy of K and V, and merges that into the rows' running
output and log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_hf.backends.hyper import HyperCall
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import GridAndArguments, Logits, Part, dense_reads
from hip_hf.backends.triton.common.sequences import GROWING
from hip_hf.backends.triton.common.tiles import LN2, LOG2E, scaled
from hip_hf.backends.triton.common.tuning import Tile, power_of_two, precision_of, tile_for
from hip_hf.backends.triton.dense import dense_rows, operands, sequences_of
from hip_hf.geometry import Span
from hip_hf.methods.hyper import Options, Square, projections, sampled_ranks, split, tile_square
from hip_hf.state import DecodeState

# Plans that stay on the device: a forward pass asks for the same ones in every layer.
KEPT_PLANS = 16
# Rows of a program that hashes, and numbers of the head dim per step.
HASHED_ROWS, HASHED_FEATURES = 64, 32


@dataclass(frozen=True)
class Level:
    """The squares of one level, on the device; rows are counted from the first query row, keys from
    the first key.

    `table` int32 `[7, squares]`: of each its `first` row and number of `rows`, its `key_first` and
    number of `keys`, the `block_rows` of a query block, the `size` of an own block and the number
    of `samples`. `starts` int32 `[squares, blocks]`: the rank at which each query block's own block
    starts. `samples` int32 `[squares, Hkv, most]`: ranks of sampled keys. `row_bounds`,
    `key_bounds` `[2 * squares]`: where squares start and end, ascending.
    """

    table: Tensor
    starts: Tensor
    samples: Tensor
    row_bounds: Tensor
    key_bounds: Tensor
    block_rows: int  # of the square where they are most

    @property
    def squares(self) -> int:
        return self.table.shape[1]

    @staticmethod
    def of(
        squares: Sequence[Square],
        position: int,
        options: Options,
        seed: int,
        heads: int,
        device: torch.device,
    ) -> Level:
        """For squares of a span whose first row is at `position`."""
        cpu = torch.device("cpu")
        integers: Any = dict(dtype=torch.int32, device=cpu)
        tilings = [tile_square(square, options, cpu) for square in squares]
        both = list(zip(squares, tilings, strict=True))
        rows = [
            [s.first - position, s.rows, s.key_first, s.keys, t.rows, t.size, t.samples]
            for s, t in both
        ]
        starts = torch.zeros(len(squares), max(len(t.starts) for t in tilings), **integers)
        most = max(1, max(t.samples for t in tilings))
        samples = torch.zeros(len(squares), heads, most, **integers)
        for i, (s, t) in enumerate(both):
            starts[i, : len(t.starts)] = t.starts
            samples[i, :, : t.samples] = sampled_ranks(s, t.samples, seed, cpu)
        table = torch.tensor(rows, **integers).t().contiguous()
        of_rows = [x - position for s in squares for x in (s.first, s.end)]
        of_keys = [x for s in squares for x in (s.key_first, s.key_end)]
        bounds = [torch.tensor(x, device=cpu) for x in (of_rows, of_keys)]
        host = (table, starts, samples, *bounds)
        table, starts, samples, row_bounds, key_bounds = (_to(x, device) for x in host)
        most_rows = max(t.rows for t in tilings)
        return Level(table, starts, samples, row_bounds, key_bounds, most_rows)

    def order(self, codes: Tensor, bounds: Tensor, bits: int) -> Tensor:
        """Tokens of each square by their hashes `codes` `[H, n]`: int64 `[H, n]`, in which a
        square's tokens stand where the square does. Ties keep their order."""
        # fewer bits are fewer passes
        kinds = ((torch.int16, 15), (torch.int32, 31), (torch.int64, 63))
        dtype = next(kind for kind, held in kinds if bits + (2 * self.squares).bit_length() <= held)
        at = torch.bucketize(torch.arange(codes.shape[1], device=codes.device), bounds, right=True)
        return codes.to(dtype).add_((at << bits).to(dtype)).argsort(dim=-1, stable=True)


def _to(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device, without waiting for it."""
    return (x.pin_memory() if device.type != "cpu" else x).to(device, non_blocking=True)


@lru_cache(maxsize=KEPT_PLANS)
def levels_of(
    first: int, end: int, options: Options, seed: int, heads: int, device: torch.device
) -> tuple[Level, ...]:
    """Levels of squares of the rows `first` to `end - 1`, with samples for `heads` key heads."""
    with torch.inference_mode(False):
        levels = split(first, end, options.min_seq_len)[1]
        return tuple(Level.of(level, first, options, seed, heads, device) for level in levels)


@triton.jit(do_not_specialize=[*GROWING, "stride_ch"])
def hash_kernel(
    X, DIRECTIONS, CODES, stride_h, stride_t, stride_ch, count, dim, steps,
    BLOCK_M: tl.constexpr, FEATURES: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles of rows, heads)`. DIRECTIONS fp32 `[dim, BITS]`, zero in columns that are no bit
    of the hash. CODES int32: the rank of the signs in Gray code."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < count
    bit, inner = tl.arange(0, BITS), tl.arange(0, FEATURES)
    x_ptr = X + head * stride_h + row.to(tl.int64)[:, None] * stride_t
    acc = tl.zeros([BLOCK_M, BITS], tl.float32)
    for i in range(steps):
        d = i * FEATURES + inner
        x = tl.load(x_ptr + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0.0).to(
            tl.float32
        )
        w = tl.load(
            DIRECTIONS + d[:, None] * BITS + bit[None, :], mask=(d < dim)[:, None], other=0.0
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    code = tl.sum((acc > 0).to(tl.int32) << bit[None, :], 1)
    code ^= code >> 16
    code ^= code >> 8
    code ^= code >> 4
    code ^= code >> 2
    code ^= code >> 1
    tl.store(CODES + head * stride_ch + row, code, mask=real)


def hash_arguments(
    x: Tensor, directions: Tensor, codes: Tensor
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `hash_kernel` for vectors `[H, n, D]`."""
    heads, count, dim = x.shape
    arguments = dict(
        X=x, DIRECTIONS=directions, CODES=codes, stride_h=x.stride(0), stride_t=x.stride(1),
        stride_ch=codes.stride(0), count=count, dim=dim, steps=-(-dim // HASHED_FEATURES),
        BLOCK_M=HASHED_ROWS, FEATURES=HASHED_FEATURES, BITS=directions.shape[1],
        PRECISION=precision_of(directions), num_warps=4,
    )  # fmt: skip
    return (-(-count // HASHED_ROWS), heads), arguments


def hashes(x: Tensor, directions: Tensor) -> Tensor:
    """As `methods.hyper.hashes`, int32 `[H, n]`, for vectors `[H, n, D]` of stride 1 in D."""
    bits = directions.shape[1]
    padded = torch.nn.functional.pad(directions, (0, max(16, power_of_two(bits)) - bits))
    codes = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    grid, arguments = hash_arguments(x, padded, codes)
    hash_kernel[grid](**arguments)
    return codes


@triton.jit(do_not_specialize=GROWING)
def square_kernel(
    Q, K, V, OUT, LSE, ROW_ORDER, KEY_ORDER, TABLE, STARTS, SAMPLES,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, stride_oh, stride_ot,
    stride_lh, stride_lt,
    stride_rows, stride_keys, stride_field, stride_starts, stride_square, stride_samples,
    dim, dim_v, scale, softcap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    EVEN_HEADDIM: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(blocks * TILES, Hq, squares)`: BLOCK_M sorted rows of a query block of a square and a
    query head. All pointers are at a span's first row and key. OUT fp32 `[Hq, n, Dv]` and LSE fp32
    `[Hq, n]` hold what the rows have so far; each row is in one square of a level."""
    block, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head, square = tl.program_id(1), tl.program_id(2)
    first, rows = tl.load(TABLE + square), tl.load(TABLE + stride_field + square)
    key_first, keys = (
        tl.load(TABLE + 2 * stride_field + square),
        tl.load(TABLE + 3 * stride_field + square),
    )
    block_rows, size = (
        tl.load(TABLE + 4 * stride_field + square),
        tl.load(TABLE + 5 * stride_field + square),
    )
    samples = tl.load(TABLE + 6 * stride_field + square)
    inner = part * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = block * block_rows + inner
    real = (inner < block_rows) & (rank < rows)
    if (part * BLOCK_M >= block_rows) | (block * block_rows + part * BLOCK_M >= rows):
        return

    key_head = head // GROUP
    d, dv, n = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, BLOCK_N)
    row = tl.load(ROW_ORDER + head.to(tl.int64) * stride_rows + first + rank, mask=real, other=0)
    q_ptr = Q + head.to(tl.int64) * stride_qh + row * stride_qt
    q = tl.load(q_ptr[:, None] + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0.0)
    start = tl.load(STARTS + square * stride_starts + block)
    ranks = SAMPLES + square.to(tl.int64) * stride_square + key_head * stride_samples
    order = KEY_ORDER + key_head.to(tl.int64) * stride_keys + key_first
    k_base, v_base = K + key_head.to(tl.int64) * stride_kh, V + key_head.to(tl.int64) * stride_vh
    # a sampled key stands for this many keys (a logarithm)
    bias = tl.log2(keys.to(tl.float32) / tl.maximum(samples, 1).to(tl.float32))

    # the online softmax goes on from what the row has: that is the merge
    lse_ptr = LSE + head.to(tl.int64) * stride_lh + row * stride_lt
    out_ptr = OUT + (head.to(tl.int64) * stride_oh + row * stride_ot)[:, None] + dv[None, :]
    if EVEN_HEADDIM:
        inside = real[:, None]
    else:
        inside = real[:, None] & (dv < dim_v)[None, :]
    m_i = tl.load(lse_ptr, mask=real, other=0.0) * LOG2E
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.load(out_ptr, mask=inside, other=0.0)
    # the own block, then the sample, as one list of slots
    for i in range(0, (size + samples + BLOCK_N - 1) // BLOCK_N):
        slot = i * BLOCK_N + n
        own = slot < size
        drawn = tl.load(ranks + slot - size, mask=(slot >= size) & (slot < size + samples), other=0)
        rest = (
            (slot >= size) & (slot < size + samples) & ((drawn < start) | (drawn >= start + size))
        )
        # what is neither repeats a key of the own block, with no weight
        token = tl.load(order + tl.where(rest, drawn, start + tl.where(own, slot, 0)))
        k_ptr, v_ptr = (
            k_base + (token * stride_kt)[:, None] + d[None, :],
            v_base + (token * stride_vt)[:, None] + dv[None, :],
        )
        if EVEN_HEADDIM:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=(d < dim)[None, :], other=0.0)
        logits = scaled(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP)
        logits += tl.where(own, 0.0, tl.where(rest, bias, float("-inf")))[None, :]
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        shrink = tl.exp2(m_i - m_new)
        weights = tl.exp2(logits - m_new[:, None])
        l_i = l_i * shrink + tl.sum(weights, 1)
        if EVEN_HEADDIM:
            v = tl.load(v_ptr)
        else:
            v = tl.load(v_ptr, mask=(dv < dim_v)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m_i = m_new

    tl.store(out_ptr, acc / l_i[:, None], mask=inside)
    tl.store(lse_ptr, (m_i + tl.log2(l_i)) * LN2, mask=real)


def rows_of_square(shape: Tile, block_rows: int) -> int:
    """Rows of a program of `square_kernel`, which cuts blocks of `block_rows` rows; tensor cores
    take 16 or more."""
    return max(16, min(shape.rows, power_of_two(block_rows)))


def square_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    orders: tuple[Tensor, Tensor], level: Level, logits: Logits, shape: Tile,
) -> GridAndArguments:  # fmt: skip
    """Grid and arguments of `square_kernel`: q `[Hq, n, D]`, k `[Hkv, T, D]`, v, out fp32
    `[Hq, n, Dv]`, lse fp32 `[Hq, n]` of a span, and the orders of its rows and keys."""
    dim, dim_v = q.shape[-1], v.shape[-1]
    rows = rows_of_square(shape, level.block_rows)
    tiles = -(-level.block_rows // rows)
    wide, wide_v = (max(16, power_of_two(x)) for x in (dim, dim_v))
    arguments = dict(
        Q=q, K=k, V=v, OUT=out, LSE=lse, ROW_ORDER=orders[0], KEY_ORDER=orders[1],
        TABLE=level.table, STARTS=level.starts, SAMPLES=level.samples,
        stride_qh=q.stride(0), stride_qt=q.stride(1), stride_kh=k.stride(0), stride_kt=k.stride(1),
        stride_vh=v.stride(0), stride_vt=v.stride(1), stride_oh=out.stride(0),
        stride_ot=out.stride(1), stride_lh=lse.stride(0), stride_lt=lse.stride(1),
        stride_rows=orders[0].stride(0), stride_keys=orders[1].stride(0),
        stride_field=level.table.stride(0), stride_starts=level.starts.stride(0),
        stride_square=level.samples.stride(0), stride_samples=level.samples.stride(1),
        dim=dim, dim_v=dim_v, scale=logits.scale, softcap=logits.softcap or 1.0,
        BLOCK_M=rows, BLOCK_N=shape.keys, TILES=tiles, GROUP=q.shape[0] // k.shape[0], D=wide,
        DV=wide_v, EVEN_HEADDIM=wide == dim and wide_v == dim_v, SOFTCAP=logits.softcap is not None,
        PRECISION=precision_of(q), num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return (level.starts.shape[1] * tiles, q.shape[0], level.squares), arguments


def attend_squares(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    orders: tuple[Tensor, Tensor], level: Level, logits: Logits,
) -> None:  # fmt: skip
    """Merge the squares of a level into out and lse (`square_arguments` says their shapes)."""
    shape = tile_for("hyper squares", q, v.shape[-1])
    grid, arguments = square_arguments(q, k, v, out, lse, orders, level, logits, shape)
    square_kernel[grid](**arguments)


class HyperAttention(HyperCall):
    """One call on a GPU: a launch for all leaves, then one per sequence and level."""

    def run(self, state: DecodeState | None) -> None:
        problem, spans = self.problem, self.problem.spans
        self.note(state)
        # rows are merged level after level, so they are kept in fp32 meanwhile
        out = self.out if self.out.dtype == torch.float32 else self.out.to(torch.float32)
        lse = self.lse
        if lse is None:
            lse = torch.full(out.shape[:3], -torch.inf, device=out.device)
        # a sliding window there may be, of all keys at least
        x = operands(replace(problem, sliding_window=None), out, lse)
        prefill(x, Part(sequences_of(tuple(self._leaves(spans)), out.device), dense_reads()))
        for span in spans:
            self._squares(span, out, lse, x.logits)
        if out is not self.out:
            self.out.copy_(out)
        tails = [self.tail(span) for span in spans]
        if any(tail < span.rows for tail, span in zip(tails, spans, strict=True)):
            dense_rows(replace(x, out=self.out, lse=self.lse), spans, tails, problem.longest)

    def _leaves(self, spans: Sequence[Span]) -> Iterator[Span]:
        """The exact parts of all spans, as short prompts."""
        for span in spans:
            key, row = span.key_start, span.row_start - span.position
            for x in split(span.position, span.end, self.options.min_seq_len)[0]:
                rows = (row + x.first, row + x.end, x.first - x.start)
                yield Span(span.batch, key + x.start, key + x.end, *rows)

    def _squares(self, span: Span, out: Tensor, lse: Tensor, logits: Logits) -> None:
        rows, options, seed = slice(span.row_start, span.row_end), self.options, self.config.seed
        keys = slice(span.key_start, span.key_start + span.end)
        q, out, lse = (x[span.batch, :, rows] for x in (self.problem.q, out, lse))
        k, v = (x[span.batch, :, keys] for x in (self.problem.k, self.problem.v))
        levels = levels_of(span.position, span.end, options, seed, k.shape[0], q.device)
        if not levels:
            return
        directions = projections(options, q.shape[2], seed, q.device)
        of_rows, of_keys = hashes(q, directions), hashes(k, directions)
        for level in levels:
            orders = (
                level.order(of_rows, level.row_bounds, options.lsh_num_projs),
                level.order(of_keys, level.key_bounds, options.lsh_num_projs),
            )
            attend_squares(q, k, v, out, lse, orders, level, logits)
