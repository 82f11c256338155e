"""The pyramid of chunk summaries on a GPU (`methods/pyramid.py` is the readable twin): one flat
table per key head, built in one pass over the keys and extended in place.

A tile of `TILE` neighbouring blocks is read once and summarised up to its own root, merged upwards
in registers. The roots' states (fp32) are kept, and what is above them is merged from these: one
small pass, or, in decode, one merge per level that becomes complete. Chunk `i` of level `l` is row
`((2 * i + 1) << l) - 1` of the table, so nothing moves when the sequence grows. Capacity is fixed,
and how far the table reaches is read and written on the device: building and appending wait for
nothing and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hip_hf.backends.triton.common.sequences import (
    GROWING,
    KeyValues,
    Sequences,
    load_sequence,
    token_offsets,
    window_start,
)
from hip_hf.backends.triton.common.tuning import power_of_two
from hip_hf.methods.base import options_of
from hip_hf.methods.need import Options

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# Kinds of representative: what a state holds and how it merges.
CENTRE = tl.constexpr(0)  # mean, lowest, highest
MIDDLE = tl.constexpr(1)  # first and middle key
# Parents merged at a time above the tiles.
PARENTS = tl.constexpr(16)
# A tile is 2 ** TILE_LEVELS blocks: what a program reads at once and keeps in registers.
TILE_LEVELS = 5
# Of the head dim, what a program takes.
DIM_AT_ONCE = 64


@triton.jit
def chunk_rows(ids, level):
    """Return where in the table the chunks `ids` (of any shape) of `level` lie: the levels are
    interleaved in order, so that a growing table never moves a row."""
    return ((2 * ids + 1) << level) - 1


@triton.jit
def blocks_needed(rows, position, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Key blocks that a call's last query block has before its window: as far as the pyramid must
    reach. 0 without rows."""
    last = position + rows - 1
    first = tl.maximum(position, last // BLOCK_Q * BLOCK_Q)
    return tl.where(rows > 0, window_start(first, window, BLOCK_K) // BLOCK_K, 0)


@triton.jit
def halves(x, N: tl.constexpr, BD: tl.constexpr):
    """`[N, BD]` -> its even and its odd rows, `[N / 2, BD]` each."""
    return tl.split(tl.permute(tl.reshape(x, (N // 2, 2, BD)), (0, 2, 1)))


@triton.jit
def merged(xl, yl, zl, xr, yr, zr, KIND: tl.constexpr):
    """State of a chunk from its halves' states. Two parts repeat the first as a third."""
    if KIND == CENTRE:
        return (xl + xr) * 0.5, tl.minimum(yl, yr), tl.maximum(zl, zr)
    else:
        return xl, xr, xl  # the middle of the whole is the first key of the right half


@triton.jit
def write_rows(
    table, ids, level, inside, d, x, y, z, weight, DIM: tl.constexpr, KIND: tl.constexpr
):
    """What scoring reads of chunks `ids` with states x, y, z `[N, BD]`."""
    WIDTH: tl.constexpr = DIM * (2 if KIND == CENTRE else 1)
    to = table + chunk_rows(ids, level).to(tl.int64)[:, None] * WIDTH + d[None, :]
    inside = inside[:, None] & (d < DIM)[None, :]
    dtype = table.dtype.element_ty
    if KIND == CENTRE:
        tl.store(to, ((1 - weight) * x + 0.5 * weight * (z + y)).to(dtype), mask=inside)
        tl.store(to + DIM, (0.5 * weight * (z - y)).to(dtype), mask=inside)
    else:
        tl.store(to, y.to(dtype), mask=inside)


@triton.jit
def write_states(states, rows, inside, d, x, y, z, DIM: tl.constexpr, KIND: tl.constexpr):
    PARTS: tl.constexpr = 3 if KIND == CENTRE else 2
    to = states + rows.to(tl.int64)[:, None] * (PARTS * DIM) + d[None, :]
    inside = inside[:, None] & (d < DIM)[None, :]
    tl.store(to, x, mask=inside)
    tl.store(to + DIM, y, mask=inside)
    if PARTS > 2:
        tl.store(to + 2 * DIM, z, mask=inside)


@triton.jit
def read_states(states, rows, inside, d, DIM: tl.constexpr, KIND: tl.constexpr):
    PARTS: tl.constexpr = 3 if KIND == CENTRE else 2
    at = states + rows.to(tl.int64)[:, None] * (PARTS * DIM) + d[None, :]
    inside = inside[:, None] & (d < DIM)[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    y = tl.load(at + DIM, mask=inside, other=0.0)
    z = x
    if PARTS > 2:
        z = tl.load(at + 2 * DIM, mask=inside, other=0.0)
    return x, y, z


@triton.jit
def build_tile(
    table, states, k, tile, needed, key_start, batch, stride_kb, stride_kt, block_table,
    stride_table, d, weight, KIND: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Summaries of the `2 ** LEVELS` blocks of a tile and of every chunk within it that is complete
    among `needed` blocks."""
    TILE: tl.constexpr = 1 << LEVELS
    blocks = tile * TILE + tl.arange(0, TILE)
    inside = blocks < needed
    there = inside[:, None] & (d < DIM)[None, :]
    first = key_start + blocks * BLOCK_K
    x = tl.zeros([TILE, BD], tl.float32)
    y = tl.full([TILE, BD], float("inf"), tl.float32)
    z = tl.full([TILE, BD], -float("inf"), tl.float32)
    if KIND == CENTRE:
        for j in range(BLOCK_K):
            at = token_offsets(
                first + j, inside, batch, stride_kb, stride_kt, block_table, stride_table, PAGE_SIZE
            )
            key = tl.load(k + at[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
            x += key
            y = tl.minimum(y, key)
            z = tl.maximum(z, key)
        x = x / BLOCK_K
    else:
        at = token_offsets(
            first, inside, batch, stride_kb, stride_kt, block_table, stride_table, PAGE_SIZE
        )
        x = tl.load(k + at[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        at = token_offsets(
            first + BLOCK_K // 2, inside, batch, stride_kb, stride_kt, block_table, stride_table,
            PAGE_SIZE)  # fmt: skip
        y = tl.load(k + at[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
    write_rows(table, blocks, 0, inside, d, x, y, z, weight, DIM, KIND)
    for level in tl.static_range(1, LEVELS + 1):
        xl, xr = halves(x, TILE >> (level - 1), BD)
        yl, yr = halves(y, TILE >> (level - 1), BD)
        zl, zr = halves(z, TILE >> (level - 1), BD)
        x, y, z = merged(xl, yl, zl, xr, yr, zr, KIND)
        ids = tile * (TILE >> level) + tl.arange(0, TILE >> level)
        write_rows(table, ids, level, ((ids + 1) << level) <= needed, d, x, y, z, weight, DIM, KIND)
    root = tile + tl.arange(0, 1)
    write_states(
        states, chunk_rows(root, 0), ((root + 1) << LEVELS) <= needed, d, x, y, z, DIM, KIND
    )


@triton.jit(do_not_specialize=GROWING)
def tiles_kernel(
    table, states, built, k, block_table, sequences, stride_sequence, stride_head,
    stride_state_sequence, stride_state_head, stride_kb, stride_kh, stride_kt, stride_table,
    stride_field, window, weight, KIND: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles, heads times parts of D, sequences)`: one tile of one key head of one sequence,
    `BD` numbers of its head dim. `table`, `states` and `built` are those of `KeyPyramid`, k those
    of `KeyValues`."""
    PARTS: tl.constexpr = (DIM + BD - 1) // BD
    tile = tl.program_id(0)
    head = tl.program_id(1) // PARTS
    sequence = tl.program_id(2)
    batch, key_start, _, rows, position = load_sequence(sequences, stride_field, sequence)
    needed = blocks_needed(rows, position, window, BLOCK_Q, BLOCK_K)
    done = tl.load(built + sequence * tl.num_programs(1) + tl.program_id(1))
    if ((tile << LEVELS) >= needed) | (((tile + 1) << LEVELS) <= done):
        return
    d = (tl.program_id(1) % PARTS) * BD + tl.arange(0, BD)
    table += sequence.to(tl.int64) * stride_sequence + head.to(tl.int64) * stride_head
    states += sequence.to(tl.int64) * stride_state_sequence + head.to(tl.int64) * stride_state_head
    k += head.to(tl.int64) * stride_kh
    build_tile(
        table, states, k, tile, needed, key_start, batch, stride_kb, stride_kt, block_table,
        stride_table, d, weight, KIND, LEVELS, BLOCK_K, PAGE_SIZE, DIM, BD)  # fmt: skip


@triton.jit(do_not_specialize=GROWING)
def append_kernel(
    table, states, built, k, block_table, sequences, stride_sequence, stride_head,
    stride_state_sequence, stride_state_head, stride_kb, stride_kh, stride_kt, stride_table,
    stride_field, window, weight, KIND: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    BUILD: tl.constexpr,
):  # fmt: skip
    """Grid `(heads times parts of D, sequences)`: extend one key head's pyramid from `built` to
    what the call needs. The tensors are as in `tiles_kernel`.

    `BUILD`: the tiles too, one after another (decode: rarely one); else `tiles_kernel` has, and
    their roots are merged.
    """
    PARTS: tl.constexpr = (DIM + BD - 1) // BD
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    batch, key_start, _, rows, position = load_sequence(sequences, stride_field, sequence)
    needed = blocks_needed(rows, position, window, BLOCK_Q, BLOCK_K)
    built += sequence * tl.num_programs(0) + program
    done = tl.load(built)
    if needed <= done:
        return
    head = program // PARTS
    d = (program % PARTS) * BD + tl.arange(0, BD)
    table += sequence.to(tl.int64) * stride_sequence + head.to(tl.int64) * stride_head
    states += sequence.to(tl.int64) * stride_state_sequence + head.to(tl.int64) * stride_state_head
    if BUILD:
        k += head.to(tl.int64) * stride_kh
        for tile in range(done >> LEVELS, (needed + (1 << LEVELS) - 1) >> LEVELS):
            build_tile(
                table, states, k, tile, needed, key_start, batch, stride_kb, stride_kt, block_table,
                stride_table, d, weight, KIND, LEVELS, BLOCK_K, PAGE_SIZE, DIM, BD)  # fmt: skip
    # every thread has read `built`, and roots are read back by other threads than wrote them
    tl.debug_barrier()
    up = 1
    while (needed >> (LEVELS + up)) > 0:
        parents = needed >> (LEVELS + up)
        for at in range(done >> (LEVELS + up), parents, PARENTS):
            ids = at + tl.arange(0, PARENTS)
            inside = ids < parents
            xl, yl, zl = read_states(states, chunk_rows(2 * ids, up - 1), inside, d, DIM, KIND)
            xr, yr, zr = read_states(states, chunk_rows(2 * ids + 1, up - 1), inside, d, DIM, KIND)
            x, y, z = merged(xl, yl, zl, xr, yr, zr, KIND)
            write_rows(table, ids, LEVELS + up, inside, d, x, y, z, weight, DIM, KIND)
            write_states(states, chunk_rows(ids, up), inside, d, x, y, z, DIM, KIND)
        tl.debug_barrier()
        up += 1
    tl.store(built, needed)


def vectors_per_summary(config: HiPConfig) -> int:
    """Of a summary: vectors that are multiplied with q and |q|."""
    return 1 if config.representative == "middle" else 2


def pyramid_constants(config: HiPConfig, dim: int, block_q: int, append: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernels of `config.representative`."""
    kind = MIDDLE if config.representative == "middle" else CENTRE
    sizes = dict(BLOCK_Q=block_q, BLOCK_K=config.block_k, DIM=dim, LEVELS=TILE_LEVELS)
    # one program that does everything needs more registers than one that makes a tile
    warps = 8 if append else 4
    return sizes | dict(KIND=kind.value, BD=min(DIM_AT_ONCE, power_of_two(dim)), num_warps=warps)


@dataclass
class KeyPyramid:
    """Summaries of the first `built` key blocks of each sequence and key head.

    `table` `[S, Hkv, rows, width]`, in the keys' dtype: chunk `i` of level `l` is row
    `((2 * i + 1) << l) - 1`. `states` fp32 `[S, Hkv, rows, state]`: what parents are merged from.
    `built` int32 `[S, programs]`, one entry per program that extends it. Memory: about
    `2 * width / (block_k * D)` of the keys'.
    """

    config: HiPConfig
    table: torch.Tensor
    states: torch.Tensor
    built: torch.Tensor

    @staticmethod
    def empty(
        config: HiPConfig, shape: tuple[int, int, int, int], like: torch.Tensor
    ) -> KeyPyramid:
        """Nothing is built yet. `shape`: sequences, key heads, head dim, and the keys a sequence
        has at most. Keys are of the dtype and on the device of `like`."""
        (sequences, heads, dim, capacity), device = shape, like.device
        blocks = max(1, capacity // config.block_k)
        tiles, parts = max(1, blocks >> TILE_LEVELS), vectors_per_summary(config)
        programs = heads * -(-dim // pyramid_constants(config, dim, 1, False)["BD"])
        table = like.new_empty(sequences, heads, 2 * blocks, parts * dim)
        states = (sequences, heads, 2 * tiles, (parts + 1) * dim)
        return KeyPyramid(
            config,
            table,
            torch.empty(states, dtype=torch.float32, device=device),
            torch.zeros(sequences, programs, dtype=torch.int32, device=device),
        )

    @property
    def dim(self) -> int:
        """Of the keys' heads."""
        return self.table.shape[3] // vectors_per_summary(self.config)

    @property
    def blocks(self) -> int:
        """Key blocks of a sequence that there is room for."""
        return self.table.shape[2] // 2

    @property
    def nbytes(self) -> int:
        """Return the memory of the summaries in bytes."""
        return self.table.nbytes + self.states.nbytes + self.built.nbytes

    def truncate(self, blocks: int | torch.Tensor) -> None:
        """Forget all but the first `blocks` blocks (of every sequence, or an int32 tensor `[S]`).
        Nothing waits."""
        limit = blocks[:, None] if isinstance(blocks, torch.Tensor) else blocks
        self.built.clamp_(max=limit)

    def reorder(self, index: torch.Tensor) -> None:
        """Sequence `i` continues what sequence `index[i]` was; int64 `[S']`. Copies the table, as
        the cache copies its keys."""
        self.table, self.states, self.built = (
            x.index_select(0, index) for x in (self.table, self.states, self.built)
        )

    def take(self, old: KeyPyramid) -> None:
        """Go on where a pyramid of smaller capacity was; rows keep their places."""
        self.table[:, :, : old.table.shape[2]] = old.table
        self.states[:, :, : old.states.shape[2]] = old.states
        self.built.copy_(old.built)

    def extend(self, kv: KeyValues, sequences: Sequences, block_q: int, append: bool) -> None:
        """Reach as far as the call's query blocks of `block_q` rows need. `append`: few keys are
        new (decode), so one launch does it all; otherwise tiles are built side by side."""
        config, blocks = self.config, sequences.max_keys // self.config.block_k
        block_table, stride_table = kv.table()
        weight = 1.0 if config.representative == "minmax" else options_of(config, Options).weight
        arguments = (
            self.table, self.states, self.built, kv.k, block_table, sequences.table,
            self.table.stride(0), self.table.stride(1), self.states.stride(0),
            self.states.stride(1), *kv.strides(kv.k), stride_table, sequences.table.stride(0),
            config.window, weight)  # fmt: skip
        fixed = pyramid_constants(config, self.dim, block_q, append) | dict(PAGE_SIZE=kv.page_size)
        programs, count = self.built.shape[1], sequences.count
        if not append and blocks:
            tiles = -(-blocks >> TILE_LEVELS)
            tiles_kernel[(tiles, programs, count)](*arguments, **fixed)
        append_kernel[(programs, count)](*arguments, BUILD=append, **fixed)
