"""Launches of the attention kernels: prompts, decode steps, gradients; and of the Delta
correction, which spreads the differences of its anchors."""

from __future__ import annotations

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
from hip_hf.backends.triton.common.tuning import Tile, tile_of
from hip_hf.backends.triton.compile.examples import Example, example, with_extension
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.delta import spread_arguments, spread_kernel


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What `hip-hf kernels` compiles: a prompt and a decode step, each contiguous, with every
    feature, and under context extension; both kernels of a prompt's gradients; the Delta
    correction of a prompt's rows."""
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
    ]


def prefill_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `attend_kernel` for a prompt: sparse, and dense rows at a stride."""
    call = Operands(x.q, x.kv, x.logits, x.out, x.lse)
    sparse = call_arguments(call, Part(x.sequences, x.reads), tile)
    strided = call_arguments(call, Part(x.sequences, dense_reads()), tile, stride=64)
    return [
        Launch(f"{name}{x.suffix}", attend_kernel, arguments, True, grid)
        for name, (grid, arguments) in (("prefill", sparse), ("dense rows at a stride", strided))
    ]


def decode_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of a decode step: its attention and its combination."""
    scratch = DecodeScratch.make(16, x.q, x.kv.v.shape[-1])
    split = Operands(x.q, x.kv, x.logits, scratch.out, scratch.lse)
    parts = call_arguments(split, Part(x.sequences, x.reads), tile)
    whole = combine_arguments(scratch, x.sequences, x.out, x.lse)
    return [
        Launch(f"decode{x.suffix}", attend_kernel, parts[1], False, parts[0]),
        Launch(f"decode, combine{x.suffix}", combine_kernel, whole[1], False, whole[0]),
    ]


def query_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `query_gradient_kernel`."""
    part, mean, grad_q = Part(x.sequences, x.reads), torch.empty_like(x.lse), torch.empty_like(x.q)
    call = Operands(x.q, x.kv, x.logits, x.out, x.lse)
    grid, arguments = query_gradient_arguments(call, part, x.out, None, grad_q, mean, tile)
    return [Launch("backward, queries", query_gradient_kernel, arguments, True, grid)]


def key_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `key_gradient_kernel`."""
    part, grads = Part(x.sequences, x.reads), (torch.empty_like(x.kv.k), torch.empty_like(x.kv.v))
    if x.q.device.type != "meta":
        lists = inverted(part, tile)
    else:
        numbers = x.sequences.table  # any int32 tensor will do
        lists = Inverted(numbers, numbers, numbers.long())
    call = Operands(x.q, x.kv, x.logits, x.out, x.lse)
    grid, passes = key_gradient_arguments(call, part, x.out, x.lse, *grads, lists, tile)
    names = ["backward, keys"] if len(passes) == 1 else ["backward, keys: dK", "backward, keys: dV"]
    return [
        Launch(name, key_gradient_kernel, each, True, grid)
        for name, each in zip(names, passes, strict=True)
    ]


def spread_launch(x: Example) -> Launch:
    """`spread_kernel` of a prompt's rows; the same on every target."""
    change = torch.empty(1, x.q.shape[1], 65, x.q.shape[-1], device=x.q.device)
    grid, arguments = spread_arguments(x.out, x.lse, change, change[..., 0], x.sequences, 64)
    return Launch("delta, step", spread_kernel, arguments, grid=grid)
