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
    x = example(dim, dtype)
    return [
        hash_launch(x, target),
        *square_launches(x, tile_of("hyper squares", target, dim, dim, dtype)),
    ]


def square_launches(x: Example, shape: Tile) -> list[Launch]:
    """`square_kernel` with and without softcap."""
    capped = replace(x, logits=replace(x.logits, softcap=50.0))
    return [
        square_launch("hyper, squares", x, shape),
        square_launch("hyper, squares, softcap", capped, shape),
    ]


def hash_launch(x: Example, target: str) -> Launch:
    """`hash_kernel` of a prompt's queries."""
    directions = torch.empty(x.q.shape[-1], 16, device=x.q.device)
    grid, arguments = hash_arguments(x.q[0], directions, x.numbers.new_empty(x.q.shape[1:3]))
    return Launch(
        "hyper, hash", hash_kernel, arguments | dict(PRECISION=full_precision(target)), grid=grid
    )


def square_launch(name: str, x: Example, shape: Tile) -> Launch:
    """`square_kernel` of one square, half a prompt against the other half, at the paper's sizes."""
    tokens, device = x.q.shape[2], x.q.device
    square = Square(tokens // 2, tokens, 0, tokens // 2)
    level = Level.of([square], 0, Options(), 0, x.kv.heads, torch.device("cpu"))
    rows, keys = (x.lse.new_empty(n, tokens, dtype=torch.int64) for n in (x.q.shape[1], x.kv.heads))
    out = torch.empty(x.out.shape[1:], device=device)
    tensors = x.q[0], x.kv.k[0], x.kv.v[0], out, x.lse[0]
    grid, arguments = square_arguments(*tensors, (rows, keys), level, x.logits, shape)
    return Launch(name, square_kernel, arguments, True, grid)
