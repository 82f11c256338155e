"""Launches of the kernels that select key blocks: votes, and the tree search."""

from __future__ import annotations

from dataclasses import replace

import torch

from hip_hf.backends.triton.compile.examples import Example, example, example_positions, extended
from hip_hf.backends.triton.compile.launch import Launch, Pointer
from hip_hf.backends.triton.selection.choose import choose_kernel
from hip_hf.backends.triton.selection.search import (
    MOST_LOOKS,
    choosing,
    chunk_rotation,
    constants,
    steps_of,
)
from hip_hf.backends.triton.selection.select import select_kernel
from hip_hf.backends.triton.selection.votes import (
    need_arguments,
    need_kernel,
    vote_arguments,
    vote_kernel,
)
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import HiPConfig


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What `hip-hf kernels` compiles of the selection: votes, then the tree search."""
    return [*launches_of_votes(dim, dtype, target), *launches_of_search(dim, dtype, target)]


def launches_of_votes(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The votes of a prompt, and what the rows of a decode step find near."""
    prompt = example(dim, dtype)
    step, paged = (example(dim, dtype, at, rows=1, block_q=1) for at in (False, True))
    return [
        *vote_launches(prompt, target),
        *vote_launches(example(dim, dtype, paged=True), target)[:1],
        *vote_launches(extended(prompt), target),
        *vote_launches(step, target)[:1],
        *vote_launches(paged, target)[:1],
        *vote_launches(extended(step), target),
    ]


def vote_launches(x: Example, target: str) -> list[Launch]:
    """Launches of `need_kernel` and `vote_kernel` for a call like `x`, with the default
    settings."""
    config, decode = HiPConfig(), x.reads.block_q == 1
    voting = Voting.of(config, x.q.shape[1] // x.kv.heads, x.reads.block_q, True)
    made = x.numbers if decode else None
    call = (config, x.logits, x.reads.block_q, made, x.lse, x.lse)
    grid, need = need_arguments(x.q, x.kv, x.sequences, *call, target=target)
    vote_grid, vote = vote_arguments(x.q, voting, x.sequences, *call, x.q, x.lse)
    suffix = f"{', decode' if decode else ''}{x.suffix}"
    return [
        Launch(f"select, need{suffix}", need_kernel, need, not decode, grid),
        Launch(f"select, votes{suffix}", vote_kernel, vote, False, vote_grid),
    ]


def launches_of_search(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The search of the default settings in prefill and in decode, with 4 query heads per key head;
    in prefill also with 8, which fill a tile of rows, in decode also shared by several programs."""
    config, found = HiPConfig(), []
    pointers = dict.fromkeys(("q", "table", "k"), Pointer(dtype))
    pointers |= dict.fromkeys(("scratch", "near"), Pointer(torch.float32))
    integers = ("block_table", "sequences", "indices", "counts", "windows", "made", "listed")
    pointers |= dict.fromkeys(integers, Pointer(torch.int32))
    numbers = dict(
        stride_qb=32 * 4096 * dim, stride_qh=4096 * dim, stride_qt=dim, stride_kb=8 * 4096 * dim, stride_kh=4096 * dim,
        stride_kt=dim, stride_table=256, stride_field=1, stride_sequence=8 * 512 * 2 * dim, stride_head=512 * 2 * dim,
        stride_near=4096, stride_scratch=0, blocks=64, heads=8, first_program=0, scale=dim**-0.5,
        sink=config.sink, window=config.window, sliding=0, refresh=config.decode_refresh,
    )  # fmt: skip
    like, indexed = (
        torch.empty(0, dtype=dtype, device="meta"),
        replace(example_positions(dim), chunk_indexed=True),
    )
    cases = [
        ("select, prefill", config.block_q, 0, 4, None, 1),
        ("select, prefill, chunk-indexed", config.block_q, 0, 4, indexed, 1),
        ("select, prefill, groups of 8", config.block_q, 0, 8, None, 1),
        ("select, decode", 1, 256, 4, None, 1),
        ("select, decode, chunk-indexed", 1, 256, 4, indexed, 1),
        ("select, decode, shared", 1, 256, 4, None, MOST_LOOKS),
        ("select, decode, shared, chunk-indexed", 1, 256, 4, indexed, MOST_LOOKS),
    ]
    for name, block_q, page_size, group, positions, looks in cases:
        fixed = constants(
            config, group, dim, dtype, block_q, 1 << 20, target, block_q == 1, positions, looks
        )
        fixed |= chunk_rotation(positions, config, like)
        arguments = dict(
            STATEFUL=block_q == 1, PAGE_SIZE=page_size, SOFTCAP=0.0, steps=steps_of(fixed), **fixed
        )
        found.append(Launch(name, select_kernel, {**pointers, **numbers, **arguments}))
        if looks > 1 and positions is None:
            given = {
                name: x
                for name, x in (pointers | numbers).items()
                if name in choose_kernel.arg_names
            }
            given["found"] = pointers["scratch"]
            found.append(
                Launch("select, decode, choice", choose_kernel, {**given, **choosing(fixed)})
            )
    return found
