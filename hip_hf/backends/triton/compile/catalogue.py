"""Every launch that users would meet, for `hip-hf kernels`, which compiles all of them for every
GPU without having one. The code that launches a kernel also makes the arguments that are compiled
here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from hip_hf.backends.triton import delta, hyper, pyramid
from hip_hf.backends.triton.attention import backward, decode, gradients, prefill
from hip_hf.backends.triton.common.arguments import Operands, Part, dense_reads
from hip_hf.backends.triton.common.tuning import Tile, full_precision, tile_of
from hip_hf.backends.triton.compile.examples import (
    Example,
    example,
    example_positions,
    with_extension,
)
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.selection import choose, search, select, votes
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import HiPConfig
from hip_hf.methods.hyper import Options, Square


def launches_of(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """All launches with that head dim and dtype on a target, one of "sm80", ..., "sm120", "gfx942",
    because launch configurations may depend on it.

    The pyramid, votes and search of the default settings; a prompt and a decode step, each
    contiguous, with every feature, and under context extension; both kernels of a prompt's
    gradients; the Delta correction of a prompt's rows; HyperAttention's hash, and its squares.
    """
    shape = (target, dim, dim, dtype)
    prompt, step = example(dim, dtype), example(dim, dtype, rows=1, block_q=1)
    paged, paged_step = example(dim, dtype, True), example(dim, dtype, True, rows=1, block_q=1)
    extended, extended_step = with_extension(prompt), with_extension(step)
    tile, step_tile = tile_of("prefill", *shape), tile_of("decode", *shape)
    return [
        *pyramid_launches(dim, dtype),
        *vote_launches(prompt, target),
        *vote_launches(paged, target)[:1],
        *vote_launches(extended, target),
        *vote_launches(step, target)[:1],
        *vote_launches(paged_step, target)[:1],
        *vote_launches(extended_step, target),
        *launches_of_search(dim, dtype, target),
        *prefill_launches(prompt, tile),
        *prefill_launches(paged, tile),
        *prefill_launches(extended, tile_of("prefill extended", *shape))[:1],
        *decode_launches(step, step_tile),
        *decode_launches(paged_step, step_tile),
        *decode_launches(extended_step, tile_of("decode extended", *shape))[:1],
        *query_launches(prompt, tile_of("backward queries", *shape)),
        *key_launches(prompt, tile_of("backward keys", *shape)),
        spread_launch(prompt),
        hash_launch(prompt, target),
        *square_launches(prompt, tile_of("hyper squares", *shape)),
    ]


def pyramid_launches(dim: int, dtype: torch.dtype) -> list[Launch]:
    """The kernels that build the pyramid of the default settings, in prefill and in decode."""
    config = HiPConfig()
    given: dict[str, Any] = dict.fromkeys(("table", "k"), MockTensor(dtype))
    given |= dict(states=MockTensor(torch.float32))
    given |= dict.fromkeys(("built", "block_table", "sequences"), MockTensor(torch.int32))
    strides = ("sequence", "head", "state_sequence", "state_head", "kb", "kh", "kt", "table")
    given |= {f"stride_{name}": 1024 * dim for name in strides}
    given |= dict(stride_field=1, window=config.window, weight=0.5)
    prompt = pyramid.pyramid_constants(config, dim, config.block_q, append=False)
    step = pyramid.pyramid_constants(config, dim, 1, append=True)
    return [
        Launch(f"pyramid, {config.representative}, {name}", kernel, given | fixed)
        for name, kernel, fixed in (
            ("tiles", pyramid.tiles_kernel, prompt | dict(PAGE_SIZE=0)),
            ("append", pyramid.append_kernel, step | dict(PAGE_SIZE=256, BUILD=True)),
            ("merge", pyramid.append_kernel, prompt | dict(PAGE_SIZE=0, BUILD=False)),
        )
    ]


def vote_launches(x: Example, target: str) -> list[Launch]:
    """Launches of `need_kernel` and `vote_kernel` for a call like `x`, with the default
    settings."""
    config, sequences, block_q = HiPConfig(), x.part.sequences, x.part.reads.block_q
    step = block_q == 1
    voting = Voting.of(config, x.q.shape[1] // x.kv.heads, block_q, True)
    made = sequences.table if step else None
    call = (config, x.logits, block_q, made, x.lse, x.lse)
    grid, need = votes.need_arguments(x.q, x.kv, sequences, *call, target=target)
    vote_grid, vote = votes.vote_arguments(x.q, voting, sequences, *call, x.q, x.lse)
    suffix = f"{', decode' if step else ''}{x.suffix}"
    return [
        Launch(f"select, need{suffix}", votes.need_kernel, need, not step, grid),
        Launch(f"select, votes{suffix}", votes.vote_kernel, vote, False, vote_grid),
    ]


def launches_of_search(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The search of the default settings in prefill and in decode, with 4 query heads per key head;
    in prefill also with 8, which fill a tile of rows, in decode also shared by several programs."""
    config, found = HiPConfig(), []
    given: dict[str, Any] = dict.fromkeys(("q", "table", "k"), MockTensor(dtype))
    given |= dict.fromkeys(("scratch", "near"), MockTensor(torch.float32))
    integers = ("block_table", "sequences", "indices", "counts", "windows", "made", "listed")
    given |= dict.fromkeys(integers, MockTensor(torch.int32))
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
        ("select, decode, shared", 1, 256, 4, None, search.MOST_LOOKS),
        ("select, decode, shared, chunk-indexed", 1, 256, 4, indexed, search.MOST_LOOKS),
    ]
    for name, block_q, page_size, group, positions, looks in cases:
        call = (group, dim, dtype, block_q, 1 << 20, target, block_q == 1, positions, looks)
        fixed = search.search_constants(config, *call)
        arguments = given | fixed | search.chunk_rotation(positions, config, like)
        found.append(Launch(name, select.select_kernel, arguments | dict(PAGE_SIZE=page_size)))
        if looks > 1 and positions is None:
            names = given.keys() & set(choose.choose_kernel.arg_names)
            arguments = {name: given[name] for name in names} | dict(found=given["scratch"])
            found.append(
                Launch(
                    "select, decode, choice",
                    choose.choose_kernel,
                    arguments | search.choosing(fixed),
                )
            )
    return found


def prefill_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `attend_kernel` for a prompt: sparse, and dense rows at a stride."""
    sparse = prefill.call_arguments(x, x.part, tile)
    strided = prefill.call_arguments(x, Part(x.part.sequences, dense_reads()), tile, stride=64)
    return [
        Launch(f"{name}{x.suffix}", prefill.attend_kernel, arguments, True, grid)
        for name, (grid, arguments) in (("prefill", sparse), ("dense rows at a stride", strided))
    ]


def decode_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of a decode step: its attention and its combination."""
    scratch = decode.DecodeScratch.make(16, x.q, x.kv.v.shape[-1])
    split = Operands(x.q, x.kv, x.logits, scratch.out, scratch.lse)
    parts = prefill.call_arguments(split, x.part, tile)
    whole = decode.combine_arguments(scratch, x.part.sequences, x.out, x.lse)
    return [
        Launch(f"decode{x.suffix}", prefill.attend_kernel, parts[1], False, parts[0]),
        Launch(f"decode, combine{x.suffix}", decode.combine_kernel, whole[1], False, whole[0]),
    ]


def query_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `query_gradient_kernel`."""
    grads = (torch.empty_like(x.q), torch.empty_like(x.lse))
    grid, arguments = backward.query_gradient_arguments(x, x.part, x.out, None, *grads, tile)
    return [Launch("backward, queries", gradients.query_gradient_kernel, arguments, True, grid)]


def key_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `key_gradient_kernel`."""
    grads = (torch.empty_like(x.kv.k), torch.empty_like(x.kv.v))
    if x.q.device.type != "meta":
        lists = backward.inverted(x.part, tile)
    else:
        numbers = x.part.sequences.table  # any int32 tensor will do
        lists = backward.Inverted(numbers, numbers, numbers.long())
    grid, passes = backward.key_gradient_arguments(x, x.part, x.out, x.lse, *grads, lists, tile)
    names = ["backward, keys"] if len(passes) == 1 else ["backward, keys: dK", "backward, keys: dV"]
    return [
        Launch(name, gradients.key_gradient_kernel, each, True, grid)
        for name, each in zip(names, passes, strict=True)
    ]


def spread_launch(x: Example) -> Launch:
    """`spread_kernel` of a prompt's rows; the same on every target."""
    change = torch.empty(1, x.q.shape[1], 65, x.q.shape[-1], device=x.q.device)
    grid, arguments = delta.spread_arguments(
        x.out, x.lse, change, change[..., 0], x.part.sequences, 64
    )
    return Launch("delta, step", delta.spread_kernel, arguments, grid=grid)


def hash_launch(x: Example, target: str) -> Launch:
    """`hash_kernel` of a prompt's queries."""
    directions = torch.empty(x.q.shape[-1], 16, device=x.q.device)
    found = x.q.new_empty(x.q.shape[1:3], dtype=torch.int32)
    grid, arguments = hyper.hash_arguments(x.q[0], directions, found)
    arguments |= dict(PRECISION=full_precision(target))
    return Launch("hyper, hash", hyper.hash_kernel, arguments, grid=grid)


def square_launches(x: Example, tile: Tile) -> list[Launch]:
    """`square_kernel` with and without softcap, of one square, half a prompt against the other
    half, at the paper's sizes."""
    tokens, device = x.q.shape[2], x.q.device
    square = Square(tokens // 2, tokens, 0, tokens // 2)
    level = hyper.Level.of([square], 0, Options(), 0, x.kv.heads, torch.device("cpu"))
    rows, keys = (x.lse.new_empty(n, tokens, dtype=torch.int64) for n in (x.q.shape[1], x.kv.heads))
    out = torch.empty(x.out.shape[1:], device=device)
    call = (x.q[0], x.kv.k[0], x.kv.v[0], out, x.lse[0], (rows, keys), level)
    found = []
    for suffix, softcap in (("", None), (", softcap", 50.0)):
        grid, arguments = hyper.square_arguments(*call, replace(x.logits, softcap=softcap), tile)
        found.append(Launch(f"hyper, squares{suffix}", hyper.square_kernel, arguments, True, grid))
    return found
