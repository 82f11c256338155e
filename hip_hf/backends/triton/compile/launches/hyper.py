"""Launches of HyperAttention: the hash, and the squares of a level."""

from __future__ import annotations

from dataclasses import replace

import torch

from hip_hf.backends.triton.common.tuning import Tile, full_precision, tile_of
from hip_hf.backends.triton.compile.examples import Example, example
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.hyper import (
    Level,
    hash_arguments,
    hash_kernel,
    square_arguments,
    square_kernel,
)
from hip_hf.methods.hyper import Options, Square


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What `hip-hf kernels` compiles: the hash, and the squares with and without softcap."""
    x, tile = example(dim, dtype), tile_of("hyper squares", target, dim, dim, dtype)
    return [hash_launch(x, target), *square_launches(x, tile)]


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
