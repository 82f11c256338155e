"""Triton kernels of the pyramid (`methods/pyramid.py` is the readable twin): summaries of chunks,
merged upwards in registers.

A tile of `TILE` neighbouring blocks is read once and summarised up to its own root. The roots'
states (fp32) are kept, and what is above them is merged from these: one small pass, or, in decode,
one merge per level that becomes complete. Chunk `i` of level `l` is row `((2 * i + 1) << l) - 1` of
the table, so nothing moves when the sequence grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.addressing import token_offsets
from hip_hf.backends.triton.common.sequences import GROWING, load_sequence, window_start

# Kinds of representative: what a state holds and how it merges.
CENTRE = tl.constexpr(0)  # mean, lowest, highest
MIDDLE = tl.constexpr(1)  # first and middle key
# Parents merged at a time above the tiles.
PARENTS = tl.constexpr(16)


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
