"""Launches of the attention kernels: prompts, decode steps, gradients."""

from __future__ import annotations

import torch

from hip_hf.backends.triton.attention.backward import (
    Inverted,
    inverted,
    key_gradient_arguments,
    query_gradient_arguments,
)
from hip_hf.backends.triton.attention.decode import Scratch, combine_arguments, combine_kernel
from hip_hf.backends.triton.attention.gradients import key_gradient_kernel, query_gradient_kernel
from hip_hf.backends.triton.attention.operands import Operands, Part
from hip_hf.backends.triton.attention.prefill import attend_kernel, call_arguments
from hip_hf.backends.triton.common.arguments import dense_reads
from hip_hf.backends.triton.common.tuning import Tile, tile_of
from hip_hf.backends.triton.compile.examples import Example, example, extended
from hip_hf.backends.triton.compile.launch import Launch


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What `hip-hf kernels` compiles of attention: prompts, decode steps, gradients."""
    parts = (launches_of_prefill, launches_of_decode, launches_of_backward)
    return [launch for part in parts for launch in part(dim, dtype, target)]


def launches_of_prefill(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """A prompt: contiguous, with every feature, and under context extension."""
    tile, x = tile_of("prefill", target, dim, dim, dtype), example(dim, dtype)
    return [
        *prefill_launches(x, tile),
        *prefill_launches(example(dim, dtype, paged=True), tile),
        *prefill_launches(extended(x), tile_of("prefill extended", target, dim, dim, dtype))[:1],
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


def launches_of_decode(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """A decode step: contiguous, with every feature, and under context extension."""
    tile = tile_of("decode", target, dim, dim, dtype)
    one, paged = (example(dim, dtype, paged, rows=1, block_q=1) for paged in (False, True))
    turning = tile_of("decode extended", target, dim, dim, dtype)
    return [
        *decode_launches(one, tile),
        *decode_launches(paged, tile),
        *decode_launches(extended(one), turning)[:1],
    ]


def decode_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of a decode step: its attention and its combination."""
    scratch = Scratch.make(16, x.q, x.kv.v.shape[-1])
    split = Operands(x.q, x.kv, x.logits, scratch.out, scratch.lse)
    parts = call_arguments(split, Part(x.sequences, x.reads), tile)
    whole = combine_arguments(scratch, x.sequences, x.out, x.lse)
    return [
        Launch(f"decode{x.suffix}", attend_kernel, parts[1], False, parts[0]),
        Launch(f"decode, combine{x.suffix}", combine_kernel, whole[1], False, whole[0]),
    ]


def launches_of_backward(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """Both kernels of the backward pass, for a prompt."""
    shape = (target, dim, dim, dtype)
    return [
        *query_launches(example(dim, dtype), tile_of("backward queries", *shape)),
        *key_launches(example(dim, dtype), tile_of("backward keys", *shape)),
    ]


def query_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `query_gradient_kernel`."""
    part, mean = Part(x.sequences, x.reads), torch.empty_like(x.lse)
    grad_q = torch.empty_like(x.q)
    call = Operands(x.q, x.kv, x.logits, x.out, x.lse)
    launch = query_gradient_arguments(call, part, x.out, None, grad_q, mean, tile)
    return [Launch("backward, queries", query_gradient_kernel, launch[1], True, launch[0])]


def key_launches(x: Example, tile: Tile) -> list[Launch]:
    """Launches of `key_gradient_kernel`."""
    part, grads = Part(x.sequences, x.reads), (torch.empty_like(x.kv.k), torch.empty_like(x.kv.v))
    lists = (
        inverted(part, tile)
        if x.q.device.type != "meta"
        else Inverted(x.numbers, x.numbers, x.numbers.long())
    )
    call = Operands(x.q, x.kv, x.logits, x.out, x.lse)
    grid, passes = key_gradient_arguments(call, part, x.out, x.lse, *grads, lists, tile)
    names = ["backward, keys"] if len(passes) == 1 else ["backward, keys: dK", "backward, keys: dV"]
    return [
        Launch(name, key_gradient_kernel, each, True, grid)
        for name, each in zip(names, passes, strict=True)
    ]
