"""Votes of query blocks, so many rows to a vote (`pooled` and `clustered` in `methods/hip.py` are the readable twins), and,
under context extension, where they stand: as far from un-rotated keys as their rows are from the last key before the window
(`voting` in `rope.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hip_hf.kernels.compiled import Launch, Pointer
from hip_hf.kernels.rotation import example_positions, placed_queries, rotation
from hip_hf.kernels.sequences import Sequences, load_sequence, query_block, window_start
from hip_hf.methods.hip import ROUNDS

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.rope import Positions

# Numbers of a tile of rows that a warp holds in registers at most, with what they are compared to.
HELD = 1024


@triton.jit
def vote_of(x, length, inside, owner, first, vote, eps):
    """Mean direction `[WIDTH]` and mean length of the rows x `[ROWS, WIDTH]` of a vote, or, if it has none, of its first ones."""
    own = inside & (owner == vote)
    own = tl.where(tl.sum(own.to(tl.int32), 0) > 0, own, inside & (first == vote))
    count = tl.sum(own.to(tl.float32), 0)
    mean = tl.sum(tl.where(own[:, None], x, 0.0), 0) / count
    size = tl.sum(tl.where(own, length, 0.0), 0) / count
    norm = tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), eps * size)  # rows may cancel out
    return mean * tl.where(norm > 0, 1.0 / norm, 0.0), size


@triton.jit
def pool_kernel(
    q, sequences, votes, COS, SIN, stride_qb, stride_qh, stride_qt, stride_field, eps, window, trained, scaling,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STRIDE: tl.constexpr, TAKEN: tl.constexpr, SAMPLES: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The votes of one query block, one head and one sequence, each of the last `TAKEN` of `STRIDE` rows; with ROUNDS, all
    rows are held, and so often go over to the vote they are nearest to. Grid: query blocks, query heads, sequences."""
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
    for tile in range(1 if ROUNDS > 0 else count):  # of rows: all, or those of one vote
        back = row if ROUNDS > 0 else (count - 1 - tile) * STRIDE + row
        inside = (row < TAKEN) & (back <= last - first)
        back = tl.where(inside, back, 0)
        pointers, here = q + (last_row - back).to(tl.int64) * stride_qt, inside[:, None] & (d < DIM)[None, :]
        if HALF > 0:
            distance = tl.minimum(last - back + 1 - window_start(first, window, BLOCK_K), trained - 1)
            x = placed_queries(pointers, here, distance, d, COS, SIN, scaling, HALF)
        else:
            x = tl.load(pointers[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 1))
        start = count - 1 - back // STRIDE
        owner = start
        for _ in range(ROUNDS):
            nearest, most = owner, tl.full([ROWS], float("-inf"), tl.float32)
            for vote in range(count):
                direction, _size = vote_of(x, length, inside, owner, start, vote, eps)
                likeness = tl.sum(x * direction[None, :], 1)
                nearest = tl.where(likeness > most, vote, nearest)
                most = tl.maximum(likeness, most)
            owner = nearest
        for vote in range(0 if ROUNDS > 0 else tile, count if ROUNDS > 0 else tile + 1):
            direction, size = vote_of(x, length, inside, owner, start, vote, eps)
            tl.store(votes + (entry * SAMPLES + vote) * DIM + d, direction * size, mask=d < DIM)


def constants(config: HiPConfig, block_q: int, dim: int) -> dict[str, int]:
    stride = config.query_stride
    rounds = ROUNDS if config.vote == "clustered" and 1 < stride < block_q else 0
    taken = block_q if rounds else 1 if config.vote == "sampled" else stride
    rows, width = triton.next_power_of_2(taken), triton.next_power_of_2(dim)
    return dict(
        BLOCK_Q=block_q, BLOCK_K=config.block_k, STRIDE=stride, TAKEN=taken, SAMPLES=-(-block_q // stride),
        ROWS=rows, DIM=dim, WIDTH=width, ROUNDS=rounds, num_warps=min(16, max(4, rows * width // HELD)),
    )  # fmt: skip


def votes_of(
    q: torch.Tensor, sequences: Sequences, config: HiPConfig, block_q: int, positions: Positions | None = None
) -> torch.Tensor:
    """Votes `[S, Hq, blocks * ceil(block_q / query_stride), D]` of the query blocks of q `[B, Hq, Tq, D]`, in its dtype. The
    votes of a block with fewer rows are the first of its places; the others are not written."""
    fixed = constants(config, block_q, q.shape[-1])
    blocks = sequences.blocks(block_q)
    votes = q.new_empty(sequences.count, q.shape[1], blocks * fixed["SAMPLES"], q.shape[-1])
    eps = torch.finfo(torch.float32).eps
    pool_kernel[(blocks, q.shape[1], sequences.count)](
        q, sequences=sequences.table, votes=votes,
        **dict(zip(("stride_qb", "stride_qh", "stride_qt"), q.stride(), strict=False)),
        stride_field=sequences.table.stride(0), eps=eps, window=config.window, **fixed, **rotation(positions, 0, q),
    )  # fmt: skip
    return votes


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """With the default settings, and clustered votes, over a contiguous prompt; the same on every target."""
    from hip_hf.config import HiPConfig

    pointers = {"q": Pointer(dtype), "votes": Pointer(dtype), "sequences": Pointer(torch.int32)}
    numbers = dict(stride_qb=32 * 4096 * dim, stride_qh=4096 * dim, stride_qt=dim, stride_field=1, eps=1e-7, window=512)
    like = torch.empty(0, dtype=dtype, device="meta")
    found = []
    for kind, config in (("votes", HiPConfig(vote="pooled")), ("clustered votes", HiPConfig(vote="clustered"))):
        arguments = {**pointers, **numbers, **constants(config, config.block_q, dim)}
        for suffix, positions in (("", None), (", extended", example_positions(dim))):
            found.append(Launch(f"select, {kind}{suffix}", pool_kernel, {**arguments, **rotation(positions, 0, like)}))
    return found
