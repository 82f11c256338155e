"""Votes by need: the rows of a query block that vote in its search, and how much they find without
it (`methods/hip.py` is the readable twin).

`need_kernel` goes through what a row that may vote reads in any case, sink and window, and through
a sample of the keys in between: the log-sum-exp of the first (`near`) says how much it finds, the
highest logit of the second less that how much it *needs* the candidates.
`vote_kernel` puts the rows of the greatest need side by side, where the search reads them. Under
context extension it also places them: as far from un-rotated keys as they are from the last key
before the window (`voting` in `rope.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hip_hf.backends.triton.common.arguments import Logits, configuration, rows_of_program
from hip_hf.backends.triton.common.rotation import queries_with_rope, rotation
from hip_hf.backends.triton.common.sequences import (
    GROWING,
    KeyValues,
    Sequences,
    always_read,
    load_sequence,
    query_block,
    still_serves,
    window_start,
)
from hip_hf.backends.triton.common.tiles import LN2, LOG2E, add_logits, key_logits
from hip_hf.backends.triton.common.tuning import Tile, power_of_two, precision_of, tile_for
from hip_hf.backends.triton.selection.topk import ABSENT, keep_best, kept_of, sort_keys, tile
from hip_hf.backends.triton.selection.voting import Voting, count_asked, count_votes, count_walkers
from hip_hf.methods import need as by_need
from hip_hf.methods.base import options_of

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# Numbers of the head dim that are copied at a time: the rows of all votes are held meanwhile.
FEATURES = 16
# Spreads the sample's places within their chunks.
SPREAD = tl.constexpr(by_need.SPREAD)
# Need is estimated from one key in this many.
SPACING = tl.constexpr(by_need.SPACING)
# Keys of a tile at least: what matrix instructions take.
FEWEST_KEYS = 16
# Of the needs of a query block, what a warp compares at a time in registers.
NEEDS = 64


@triton.jit
def near_keys(slots, end, start, sink_length, window, row_at, sliding, SLIDING: tl.constexpr):
    """Of the list `[sink | window]`: positions of the keys at `slots`, and which of the rows at
    `row_at` see them."""
    position = tl.where(slots < sink_length, start + slots, window + slots - sink_length)
    seen = (slots < end)[None, :] & (position[None, :] <= row_at[:, None])
    if SLIDING:
        seen &= position[None, :] > row_at[:, None] - sliding
    return position, seen


@triton.jit(do_not_specialize=[*GROWING, "stride_near"])
def need_kernel(
    Q, K, NEAR, NEED, SINKS, SEQUENCES, TABLE, MADE, COS, SIN, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_near, stride_field, stride_table, stride_made,
    sink_keys, window_keys, refresh, dim, scale, softcap, sliding, trained, scaling,
    BUDGET: tl.constexpr, SAMPLE: tl.constexpr, MEMBERS: tl.constexpr, VOTES: tl.constexpr,
    VOTES_WHOLE: tl.constexpr, MOST: tl.constexpr, STRIDE: tl.constexpr, RANKED: tl.constexpr,
    STATEFUL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SLIDING: tl.constexpr,
    PRECISION: tl.constexpr, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """`NEAR` and, if the rows are to be `RANKED` by it, `NEED`, fp32 `[S, Hq, rows]`, of a tile of
    `BLOCK_M` rows of a query block that may vote, every `STRIDE`-th, and the `GROUP` heads of a key
    head. Grid: tiles, key heads, sequences.

    Nothing is written where nothing is searched: there are up to `BUDGET` candidates, or
    (`STATEFUL`) a selection is kept. `SAMPLE`: keys of the candidates at most. ROPE_HALF_DIM > 0:
    this many pairs of a head's numbers turn, sink and window to where attention has them, with the
    keys of `BUDGET` blocks in between (`rope.py`).
    """
    ASKED: tl.constexpr = (BLOCK_Q + STRIDE - 1) // STRIDE
    TILES: tl.constexpr = (ASKED + BLOCK_M - 1) // BLOCK_M
    number, key_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, key_start, row_start, rows, position = load_sequence(SEQUENCES, stride_field, sequence)
    row, block_first, block_last = query_block(row_start, rows, position, number // TILES, BLOCK_Q)
    own_rows = block_last - block_first + 1
    first = block_first + (own_rows - 1) % STRIDE + number % TILES * (BLOCK_M * STRIDE)
    last = tl.minimum(first + (BLOCK_M - 1) * STRIDE, block_last)
    if (own_rows < 1) | (first > last):
        return
    if STATEFUL:  # noqa: SIM102 (settled when the kernel is compiled)
        if still_serves(MADE + sequence * stride_made, position, rows, refresh):
            return
    begin = window_start(block_first, window_keys, BLOCK_K)
    start, sink, window = always_read(block_first, begin, sink_keys, sliding, BLOCK_K)
    if window // BLOCK_K - sink // BLOCK_K <= BUDGET:
        return

    # Tile row m is the tile's row m // GROUP_PADDED of head m % GROUP_PADDED.
    m = tl.arange(0, BLOCK_M * GROUP_PADDED)
    row_at, member = first + m // GROUP_PADDED * STRIDE, m % GROUP_PADDED
    real = (row_at <= last) & (member < GROUP)
    head = key_head * GROUP + member
    d, n = tl.arange(0, D), tl.arange(0, BLOCK_N)
    query_row = row + row_at - block_first
    q_ptr = (
        Q
        + batch.to(tl.int64) * stride_qb
        + head.to(tl.int64) * stride_qh
        + query_row.to(tl.int64) * stride_qt
    )
    here = real[:, None] & (d < dim)[None, :]
    k_base = K + key_head.to(tl.int64) * stride_kh
    sink_length = sink - start
    end = sink_length + last - window + 1
    m_i = tl.full([BLOCK_M * GROUP_PADDED], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M * GROUP_PADDED], tl.float32)
    if HAS_SINKS:
        m_i = tl.load(SINKS + head, mask=member < GROUP, other=0.0).to(tl.float32) * LOG2E
        l_i += 1.0

    if ROPE_HALF_DIM > 0:
        # as in `prefill.py`, but for the places of the selected keys, which nobody takes
        gap: tl.constexpr = BUDGET * BLOCK_K
        before = sink_length + gap - window
        own = before + row_at
        earliest = own - trained + 1
        shift, far = (
            tl.maximum(before + first + 1 - trained, 0),
            tl.maximum(before + last + 1 - trained, 0),
        )
        stop = tl.minimum(far, sink_length) + tl.maximum(far - sink_length - gap, 0)
        if stop > 0:
            farthest = tl.full([BLOCK_M * GROUP_PADDED], trained - 1, tl.int32)
            q = queries_with_rope(q_ptr, here, farthest, d, COS, SIN, scaling, ROPE_HALF_DIM).to(
                Q.dtype.element_ty
            )
            for i in tl.range(0, stop, BLOCK_N, disable_licm=True):
                slots = i + n
                at, seen = near_keys(
                    slots, end, start, sink_length, window, row_at, sliding, SLIDING
                )
                place = slots + tl.where(slots < sink_length, 0, gap)
                seen &= place[None, :] < earliest[:, None]
                logits = key_logits(
                    q, k_base, at, slots < end, seen, place, COS, SIN, key_start, batch, stride_kb,
                    stride_kt, TABLE, stride_table, scale, softcap, dim, D, PAGE_SIZE, SOFTCAP,
                    PRECISION, 0)  # fmt: skip
                m_i, l_i = add_logits(m_i, l_i, logits)
        q = queries_with_rope(q_ptr, here, own - shift, d, COS, SIN, scaling, ROPE_HALF_DIM).to(
            Q.dtype.element_ty
        )
        for i in tl.range(0, end, BLOCK_N, disable_licm=True):
            slots = i + n
            at, seen = near_keys(slots, end, start, sink_length, window, row_at, sliding, SLIDING)
            place = slots + tl.where(slots < sink_length, 0, gap)
            seen &= place[None, :] >= earliest[:, None]
            logits = key_logits(
                q, k_base, at, slots < end, seen, tl.maximum(place - shift, 0), COS, SIN, key_start,
                batch, stride_kb, stride_kt, TABLE, stride_table, scale, softcap, dim, D, PAGE_SIZE,
                SOFTCAP, PRECISION, ROPE_HALF_DIM)  # fmt: skip
            m_i, l_i = add_logits(m_i, l_i, logits)
    else:
        q = tl.load(q_ptr[:, None] + d[None, :], mask=here, other=0.0)
        for i in range(0, end, BLOCK_N):
            slots = i + n
            at, seen = near_keys(slots, end, start, sink_length, window, row_at, sliding, SLIDING)
            logits = key_logits(
                q, k_base, at, slots < end, seen, slots, COS, SIN, key_start, batch, stride_kb,
                stride_kt, TABLE, stride_table, scale, softcap, dim, D, PAGE_SIZE, SOFTCAP,
                PRECISION, 0)  # fmt: skip
            m_i, l_i = add_logits(m_i, l_i, logits)
    near = (m_i + tl.log2(l_i)) * LN2
    to = (sequence * tl.num_programs(1) * GROUP + head).to(tl.int64) * stride_near + (
        row_at - position
    )
    tl.store(NEAR + to, near, mask=real)

    if RANKED:
        low, high = sink // BLOCK_K * BLOCK_K, window // BLOCK_K * BLOCK_K
        fewest: tl.constexpr = SAMPLE // 4 if SAMPLE > 8 else 2
        level, most = low * 0, tl.minimum(SAMPLE, tl.maximum(fewest, (high - low) // SPACING))
        while (high >> level) - ((low + (1 << level) - 1) >> level) > most:
            level += 1
        chunk, ends = (low + (1 << level) - 1) >> level, high >> level
        asked = count_asked(own_rows, MEMBERS, STRIDE)
        # where all of them vote nothing is to be estimated
        votes = count_votes(
            own_rows, (high - low) // BLOCK_K, MEMBERS, VOTES, VOTES_WHOLE, MOST, STRIDE
        )
        ends = tl.where(votes < asked, ends, chunk)
        m_i = tl.full([BLOCK_M * GROUP_PADDED], float("-inf"), tl.float32)
        if ROPE_HALF_DIM > 0:
            distance = tl.minimum(row_at + 1 - window, trained - 1)
            q = queries_with_rope(q_ptr, here, distance, d, COS, SIN, scaling, ROPE_HALF_DIM).to(
                Q.dtype.element_ty
            )
        for i in range(chunk, ends, BLOCK_N):
            inside = i + n < ends
            spread = ((i + n).to(tl.int64) * SPREAD & 0xFFFFFFFF) >> (32 - level)
            at = ((i + n) << level) + spread.to(tl.int32)
            logits = key_logits(
                q, k_base, at, inside, inside[None, :], n, COS, SIN, key_start, batch, stride_kb,
                stride_kt, TABLE, stride_table, scale, softcap, dim, D, PAGE_SIZE, SOFTCAP,
                PRECISION, 0)  # fmt: skip
            m_i = tl.maximum(m_i, tl.max(logits, 1))
        tl.store(NEED + to, m_i * LN2 - near, mask=real)


@triton.jit(do_not_specialize=["stride_near"])
def vote_kernel(
    Q, NEAR, NEED, VOTED, VOTED_NEAR, SEQUENCES, MADE, COS, SIN, stride_qb, stride_qh, stride_qt,
    stride_near, stride_field, stride_made, sink_keys, window_keys, refresh, sliding, trained,
    scaling, BUDGET: tl.constexpr, MEMBERS: tl.constexpr, VOTES: tl.constexpr,
    VOTES_WHOLE: tl.constexpr, MOST: tl.constexpr, WALKERS: tl.constexpr, STRIDE: tl.constexpr,
    SLOTS: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr, RANKED: tl.constexpr,
    WEIGHED: tl.constexpr, STATEFUL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, FEATURES: tl.constexpr, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """The votes of one query block and mask head: `VOTED` `[S, H, blocks * SLOTS, D]`, and
    (`WEIGHED`) their `VOTED_NEAR` fp32 `[S, H, blocks * SLOTS]`. Grid: query blocks, mask heads,
    sequences. As in `need_kernel`, nothing where nothing is searched.

    Of every `STRIDE`-th row those of the greatest need (`RANKED`; of these the neediest `WALKERS`
    first), or all. ROPE_HALF_DIM > 0: rotated to where they select.
    """
    index, mask_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, _, row_start, rows, position = load_sequence(SEQUENCES, stride_field, sequence)
    first_row, first, last = query_block(row_start, rows, position, index, BLOCK_Q)
    if first > last:
        return
    if STATEFUL:  # noqa: SIM102 (settled when the kernel is compiled)
        if still_serves(MADE + sequence * stride_made, position, rows, refresh):
            return
    _, sink, window = always_read(
        first, window_start(first, window_keys, BLOCK_K), sink_keys, sliding, BLOCK_K
    )
    candidates = window // BLOCK_K - sink // BLOCK_K
    if candidates <= BUDGET:
        return
    own_rows = last - first + 1
    total = count_votes(own_rows, candidates, MEMBERS, VOTES, VOTES_WHOLE, MOST, STRIDE)
    entry = (sequence * tl.num_programs(1) + mask_head).to(tl.int64)
    start = entry * MEMBERS * stride_near + (first - position)
    slot = tl.arange(0, KEPT)
    inside = slot < total
    skipped = (own_rows - 1) % STRIDE  # rows before the first that may vote
    ids, place = slot, slot
    if RANKED:
        every = tl.arange(0, N)  # by position, then by head
        there = every < count_asked(own_rows, MEMBERS, STRIDE)
        at = skipped + every // MEMBERS * STRIDE
        need = tl.load(
            NEED + start + (every % MEMBERS).to(tl.int64) * stride_near + at, mask=there, other=0.0
        )
        none = first * 0 + ABSENT
        ids, needs, _ = keep_best(
            every, sort_keys(need, there), first, none, first, none, total, N, KEPT
        )
        walking = count_walkers(total, own_rows, MEMBERS, STRIDE, WALKERS)
        walks, _, _ = kept_of(needs, none, none, walking)
        before = tl.cumsum(walks, 0)  # with the slot itself
        place = tl.where(walks > 0, before - 1, walking + slot - before)
    ids = tl.where(inside, ids, 0)
    row, member = skipped + ids // MEMBERS * STRIDE, ids % MEMBERS
    to = (entry * tl.num_programs(0) + index) * SLOTS + place
    if WEIGHED:
        near = tl.load(
            NEAR + start + member.to(tl.int64) * stride_near + row, mask=inside, other=0.0
        )
        tl.store(VOTED_NEAR + to, near, mask=inside)
    head = mask_head * MEMBERS + member
    q_ptr = (
        Q
        + batch.to(tl.int64) * stride_qb
        + head.to(tl.int64) * stride_qh
        + (first_row + row).to(tl.int64) * stride_qt
    )
    distance = tl.minimum(first + row + 1 - window, trained - 1)
    for part in range(0, DIM, FEATURES):
        d = part + tl.arange(0, FEATURES)
        here = inside[:, None] & (d < DIM)[None, :]
        if ROPE_HALF_DIM > 0:
            x = queries_with_rope(q_ptr, here, distance, d, COS, SIN, scaling, ROPE_HALF_DIM)
        else:
            x = tl.load(q_ptr[:, None] + d[None, :], mask=here, other=0.0)
        tl.store(VOTED + to[:, None] * DIM + d[None, :], x.to(VOTED.dtype.element_ty), mask=here)


def shared_arguments(
    q: torch.Tensor, voting: Voting, sequences: Sequences, config: HiPConfig, logits: Logits,
    block_q: int, made: torch.Tensor | None, near: torch.Tensor, need: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    """What both kernels are told: q `[B, Hq, Tq, D]`, `made` as `SelectionBuffers` keep it, near
    and need fp32 `[S, Hq, rows]`."""
    return dict(
        Q=q, NEAR=near, NEED=need, SEQUENCES=sequences.table,
        MADE=sequences.table if made is None else made, stride_qb=q.stride(0),
        stride_qh=q.stride(1), stride_qt=q.stride(2), stride_near=near.shape[-1],
        stride_field=sequences.table.stride(0), stride_made=0 if made is None else made.stride(0),
        sink_keys=config.sink, window_keys=config.window, refresh=config.decode_refresh,
        sliding=logits.sliding_window or 0, BUDGET=config.budget_blocks, MEMBERS=voting.members,
        VOTES=voting.votes, VOTES_WHOLE=voting.votes_whole, MOST=config.start_blocks,
        STRIDE=voting.stride, RANKED=voting.ranked, STATEFUL=made is not None, BLOCK_Q=block_q,
        BLOCK_K=config.block_k,
    )  # fmt: skip


def need_arguments(
    q: torch.Tensor, kv: KeyValues, sequences: Sequences, config: HiPConfig, logits: Logits,
    block_q: int, made: torch.Tensor | None, near: torch.Tensor, need: torch.Tensor,
    target: str | None = None, shape: Tile | None = None,
) -> tuple[tuple[int, int, int], dict[str, Any]]:  # fmt: skip
    """Grid and arguments of `need_kernel`, tensors as in `shared_arguments`. `target` and `shape`
    are given where they are not those of q's device."""
    dim, group = q.shape[-1], q.shape[1] // kv.heads
    voting = Voting.of(config, group, block_q, logits.positions is not None)
    # attention's tiles, which hold values besides
    kernel = configuration("decode" if block_q == 1 else "prefill", logits)
    shape = shape or tile_for(kernel, q, dim, target)
    if logits.positions is not None:
        # queries are rotated three times, keys as well: what waits to be used must be little
        shape = replace(shape, keys=max(FEWEST_KEYS, shape.keys // 2), stages=1)
    elif kv.page_size:
        # keys wait for the number of their page, which is looked up in the same turn
        shape = replace(shape, stages=min(shape.stages, 2))
    rows = rows_of_program(shape, group, voting.asked)
    (table, stride_table), options = kv.table(), options_of(config, by_need.Options)
    arguments = dict(
        **shared_arguments(q, voting, sequences, config, logits, block_q, made, near, need), K=kv.k,
        SINKS=q if logits.sinks is None else logits.sinks.contiguous(), TABLE=table,
        **dict(zip(("stride_kb", "stride_kh", "stride_kt"), kv.strides(kv.k), strict=True)),
        stride_table=stride_table, dim=dim, scale=logits.scale, softcap=logits.softcap or 1.0,
        SAMPLE=options.sample, BLOCK_M=rows, BLOCK_N=shape.keys, GROUP=group,
        GROUP_PADDED=power_of_two(group), D=max(16, power_of_two(dim)), PAGE_SIZE=kv.page_size,
        HAS_SINKS=logits.sinks is not None, SOFTCAP=logits.softcap is not None,
        SLIDING=logits.sliding_window is not None, PRECISION=precision_of(q),
        **rotation(logits.positions, rows * voting.stride + shape.keys, q),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    tiles = sequences.blocks(block_q) * -(-voting.asked // rows)
    return (tiles, kv.heads, sequences.count), arguments


def vote_arguments(
    q: torch.Tensor, voting: Voting, sequences: Sequences, config: HiPConfig, logits: Logits,
    block_q: int, made: torch.Tensor | None, near: torch.Tensor, need: torch.Tensor,
    voted: torch.Tensor, voted_near: torch.Tensor,
) -> tuple[tuple[int, int, int], dict[str, Any]]:  # fmt: skip
    """Grid and arguments of `vote_kernel`, tensors as in `shared_arguments`; voted is
    `[S, H, blocks * slots, D]`, voted_near fp32 `[S, H, blocks * slots]`."""
    needs = tile(voting.members * voting.asked)
    arguments = dict(
        **shared_arguments(q, voting, sequences, config, logits, block_q, made, near, need),
        VOTED=voted, VOTED_NEAR=voted_near, WALKERS=voting.walkers, SLOTS=voting.slots, N=needs,
        KEPT=tile(voting.slots), WEIGHED=voting.weighed, DIM=q.shape[-1], FEATURES=FEATURES,
        **rotation(logits.positions, 0, q), num_warps=min(16, max(4, needs // NEEDS)),
    )  # fmt: skip
    return (sequences.blocks(block_q), q.shape[1] // voting.members, sequences.count), arguments


def select_votes(
    q: torch.Tensor, kv: KeyValues, sequences: Sequences, config: HiPConfig, logits: Logits,
    block_q: int, made: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the search reads as its queries, and fp32 how much they find near, of query blocks that
    search; elsewhere nothing is written. Either the votes `[S, H, blocks * slots, D]`, those of a
    query block in its first slots, with near `[S, H, blocks * slots]`; or q `[B, Hq, Tq, D]` itself
    with near `[S, Hq, rows]`, from the first row of each sequence on (`Voting`)."""
    voting = Voting.of(config, q.shape[1] // kv.heads, block_q, logits.positions is not None)
    call = (sequences, config, logits, block_q, made)
    near = need = q  # stand-ins that no kernel reads
    if voting.weighed or voting.ranked:
        near = q.new_empty(sequences.count, q.shape[1], sequences.max_rows, dtype=torch.float32)
        need = torch.empty_like(near) if voting.ranked else near
        grid, arguments = need_arguments(q, kv, *call, near, need)
        need_kernel[grid](**arguments)
    if not voting.chosen:
        return q, near
    mask_heads, slots = q.shape[1] // voting.members, sequences.blocks(block_q) * voting.slots
    shape = (sequences.count, mask_heads, slots)
    voted = q.new_empty(*shape, q.shape[-1])
    voted_near = near.new_empty(shape) if voting.weighed else near
    grid, arguments = vote_arguments(q, voting, *call, near, need, voted, voted_near)
    vote_kernel[grid](**arguments)
    return voted, voted_near
