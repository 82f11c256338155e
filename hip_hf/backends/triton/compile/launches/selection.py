"""Launches of the kernels that select key blocks: the pyramid, votes, and the tree search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hip_hf.backends.triton.compile.examples import (
    Example,
    example,
    example_positions,
    with_extension,
)
from hip_hf.backends.triton.compile.launch import Launch, Pointer
from hip_hf.backends.triton.pyramid.pyramid import pyramid_constants
from hip_hf.backends.triton.pyramid.summaries import append_kernel, tiles_kernel
from hip_hf.backends.triton.selection.choose import choose_kernel
from hip_hf.backends.triton.selection.search import (
    MOST_LOOKS,
    choosing,
    chunk_rotation,
    search_constants,
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
    """What `hip-hf kernels` compiles of the selection: the pyramid, the votes of a prompt, what the
    rows of a decode step find near, and the tree search."""
    prompt, step = example(dim, dtype), example(dim, dtype, rows=1, block_q=1)
    paged, paged_step = example(dim, dtype, True), example(dim, dtype, True, rows=1, block_q=1)
    return [
        *pyramid_launches(dim, dtype),
        *vote_launches(prompt, target),
        *vote_launches(paged, target)[:1],
        *vote_launches(with_extension(prompt), target),
        *vote_launches(step, target)[:1],
        *vote_launches(paged_step, target)[:1],
        *vote_launches(with_extension(step), target),
        *launches_of_search(dim, dtype, target),
    ]


def pyramid_launches(dim: int, dtype: torch.dtype) -> list[Launch]:
    """The kernels that build the pyramid of the default settings, in prefill and in decode."""
    config = HiPConfig()
    given: dict[str, Any] = dict.fromkeys(("table", "k"), Pointer(dtype))
    given |= dict(states=Pointer(torch.float32))
    given |= dict.fromkeys(("built", "block_table", "sequences"), Pointer(torch.int32))
    strides = ("sequence", "head", "state_sequence", "state_head", "kb", "kh", "kt", "table")
    given |= {f"stride_{name}": 1024 * dim for name in strides}
    given |= dict(stride_field=1, window=config.window, weight=0.5)
    prompt = pyramid_constants(config, dim, config.block_q, append=False)
    step = pyramid_constants(config, dim, 1, append=True)
    return [
        Launch(f"pyramid, {config.representative}, {name}", kernel, given | fixed)
        for name, kernel, fixed in (
            ("tiles", tiles_kernel, prompt | dict(PAGE_SIZE=0)),
            ("append", append_kernel, step | dict(PAGE_SIZE=256, BUILD=True)),
            ("merge", append_kernel, prompt | dict(PAGE_SIZE=0, BUILD=False)),
        )
    ]


def vote_launches(x: Example, target: str) -> list[Launch]:
    """Launches of `need_kernel` and `vote_kernel` for a call like `x`, with the default
    settings."""
    config, sequences, block_q = HiPConfig(), x.part.sequences, x.part.reads.block_q
    decode = block_q == 1
    voting = Voting.of(config, x.q.shape[1] // x.kv.heads, block_q, True)
    made = sequences.table if decode else None
    call = (config, x.logits, block_q, made, x.lse, x.lse)
    grid, need = need_arguments(x.q, x.kv, sequences, *call, target=target)
    vote_grid, vote = vote_arguments(x.q, voting, sequences, *call, x.q, x.lse)
    suffix = f"{', decode' if decode else ''}{x.suffix}"
    return [
        Launch(f"select, need{suffix}", need_kernel, need, not decode, grid),
        Launch(f"select, votes{suffix}", vote_kernel, vote, False, vote_grid),
    ]


def launches_of_search(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The search of the default settings in prefill and in decode, with 4 query heads per key head;
    in prefill also with 8, which fill a tile of rows, in decode also shared by several programs."""
    config, found = HiPConfig(), []
    given: dict[str, Any] = dict.fromkeys(("q", "table", "k"), Pointer(dtype))
    given |= dict.fromkeys(("scratch", "near"), Pointer(torch.float32))
    integers = ("block_table", "sequences", "indices", "counts", "windows", "made", "listed")
    given |= dict.fromkeys(integers, Pointer(torch.int32))
    given |= dict(
        stride_qb=32 * 4096 * dim, stride_qh=4096 * dim, stride_qt=dim, stride_kb=8 * 4096 * dim,
        stride_kh=4096 * dim, stride_kt=dim, stride_table=256, stride_field=1,
        stride_sequence=8 * 512 * 2 * dim, stride_head=512 * 2 * dim, stride_near=4096,
        stride_scratch=0, blocks=64, heads=8, first_program=0, scale=dim**-0.5, sink=config.sink,
        window=config.window, sliding=0, refresh=config.decode_refresh, SOFTCAP=0.0,
    )  # fmt: skip
    like = torch.empty(0, dtype=dtype, device="meta")
    indexed = replace(example_positions(dim), chunk_indexed=True)
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
        call = (group, dim, dtype, block_q, 1 << 20, target, block_q == 1, positions, looks)
        fixed = search_constants(config, *call)
        arguments = given | fixed | chunk_rotation(positions, config, like)
        found.append(Launch(name, select_kernel, arguments | dict(PAGE_SIZE=page_size)))
        if looks > 1 and positions is None:
            names = given.keys() & set(choose_kernel.arg_names)
            arguments = {name: given[name] for name in names} | dict(found=given["scratch"])
            found.append(
                Launch("select, decode, choice", choose_kernel, arguments | choosing(fixed))
            )
    return found
