"""Launches of the attention kernels: prompts, decode steps, gradients; of the Delta correction,
which spreads the differences of its anchors; and of HyperAttention."""

from __future__ import annotations

from dataclasses import replace

import torch

from hip_hf.backends.triton.attention.backward import (
    Inverted,
    inverted,
    key_gradient_arguments,
    query_gradient_arguments,
)
from hip_hf.backends.triton.attention.decode import DecodeScratch, combine_arguments, combine_kernel
from hip_hf.backends.triton.attention.gradients import key_gradient_kernel, query_gradient_kernel
from hip_hf.backends.triton.attention.operands import Operands, Part
from hip_hf.backends.triton.attention.prefill import attend_kernel, call_arguments
from hip_hf.backends.triton.common.arguments import dense_reads
from hip_hf.backends.triton.common.tuning import Tile, full_precision, tile_of
from hip_hf.backends.triton.compile.examples import Example, example, with_extension
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.delta import spread_arguments, spread_kernel
from hip_hf.backends.triton.hyper import (
    Level,
    hash_arguments,
    hash_kernel,
    square_arguments,
    square_kernel,
)
from hip_hf.methods.hyper import Options, Square


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What `hip-hf kernels` compiles: a prompt and a decode step, each contiguous, with every
    feature, and under context extension; both kernels of a prompt's gradients; the Delta
    correction of a prompt's rows; HyperAttention's hash, and its squares."""
    shape = (target, dim, dim, dtype)
    prompt, step = example(dim, dtype), example(dim, dtype, rows=1, block_q=1)
    paged, paged_step = example(dim, dtype, True), example(dim, dtype, True, rows=1, block_q=1)
    tile, step_tile = tile_of("prefill", *shape), tile_of("decode", *shape)
    return [
        *prefill_launches(prompt, tile),
        *prefill_launches(paged, tile),
        *prefill_launches(with_extension(prompt), tile_of("prefill extended", *shape))[:1],
        *decode_launches(step, step_tile),
        *decode_launches(paged_step, step_tile),
        *decode_launches(with_extension(step), tile_of("decode extended", *shape))[:1],
        *query_launches(prompt, tile_of("backward queries", *shape)),
        *key_launches(prompt, tile_of("backward keys", *shape)),
        spread_launch(prompt),
        hash_launch(prompt, target),
        *square_launches(prompt, tile_of("hyper squares", *shape)),
    ]


def prefill_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `attend_kernel` for a prompt: sparse, and dense rows at a stride."""
    sparse = call_arguments(x, x.part, tile)
    strided = call_arguments(x, Part(x.part.sequences, dense_reads()), tile, stride=64)
    return [
        Launch(f"{name}{x.suffix}", attend_kernel, arguments, True, grid)
        for name, (grid, arguments) in (("prefill", sparse), ("dense rows at a stride", strided))
    ]


def decode_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of a decode step: its attention and its combination."""
    scratch = DecodeScratch.make(16, x.q, x.kv.v.shape[-1])
    split = Operands(x.q, x.kv, x.logits, scratch.out, scratch.lse)
    parts = call_arguments(split, x.part, tile)
    whole = combine_arguments(scratch, x.part.sequences, x.out, x.lse)
    return [
        Launch(f"decode{x.suffix}", attend_kernel, parts[1], False, parts[0]),
        Launch(f"decode, combine{x.suffix}", combine_kernel, whole[1], False, whole[0]),
    ]


def query_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `query_gradient_kernel`."""
    grads = (torch.empty_like(x.q), torch.empty_like(x.lse))
    grid, arguments = query_gradient_arguments(x, x.part, x.out, None, *grads, tile)
    return [Launch("backward, queries", query_gradient_kernel, arguments, True, grid)]


def key_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `key_gradient_kernel`."""
    grads = (torch.empty_like(x.kv.k), torch.empty_like(x.kv.v))
    if x.q.device.type != "meta":
        lists = inverted(x.part, tile)
    else:
        numbers = x.part.sequences.table  # any int32 tensor will do
        lists = Inverted(numbers, numbers, numbers.long())
    grid, passes = key_gradient_arguments(x, x.part, x.out, x.lse, *grads, lists, tile)
    names = ["backward, keys"] if len(passes) == 1 else ["backward, keys: dK", "backward, keys: dV"]
    return [
        Launch(name, key_gradient_kernel, each, True, grid)
        for name, each in zip(names, passes, strict=True)
    ]


def spread_launch(x: Example) -> Launch:
    """`spread_kernel` of a prompt's rows; the same on every target."""
    change = torch.empty(1, x.q.shape[1], 65, x.q.shape[-1], device=x.q.device)
    grid, arguments = spread_arguments(x.out, x.lse, change, change[..., 0], x.part.sequences, 64)
    return Launch("delta, step", spread_kernel, arguments, grid=grid)


def hash_launch(x: Example, target: str) -> Launch:
    """`hash_kernel` of a prompt's queries."""
    directions = torch.empty(x.q.shape[-1], 16, device=x.q.device)
    found = x.q.new_empty(x.q.shape[1:3], dtype=torch.int32)
    grid, arguments = hash_arguments(x.q[0], directions, found)
    arguments |= dict(PRECISION=full_precision(target))
    return Launch("hyper, hash", hash_kernel, arguments, grid=grid)


def square_launches(x: Example, tile: Tile) -> list[Launch]:
    """`square_kernel` with and without softcap, of one square, half a prompt against the other
    half, at the paper's sizes."""
    tokens, device = x.q.shape[2], x.q.device
    square = Square(tokens // 2, tokens, 0, tokens // 2)
    level = Level.of([square], 0, Options(), 0, x.kv.heads, torch.device("cpu"))
    rows, keys = (x.lse.new_empty(n, tokens, dtype=torch.int64) for n in (x.q.shape[1], x.kv.heads))
    out = torch.empty(x.out.shape[1:], device=device)
    call = (x.q[0], x.kv.k[0], x.kv.v[0], out, x.lse[0], (rows, keys), level)
    found = []
    for suffix, softcap in (("", None), (", softcap", 50.0)):
        grid, arguments = square_arguments(*call, replace(x.logits, softcap=softcap), tile)
        found.append(Launch(f"hyper, squares{suffix}", square_kernel, arguments, True, grid))
    return found
