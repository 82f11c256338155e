"""Launches of the Delta correction: what spreads the differences of the anchors."""

from __future__ import annotations

import torch

from hip_hf.backends.triton.compile.examples import example
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.delta import spread_arguments, spread_kernel


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What `hip-hf kernels` compiles: a prompt's rows; the same on every target."""
    x = example(dim, dtype)
    change = torch.empty(1, x.q.shape[1], 65, dim, device=x.q.device)
    grid, arguments = spread_arguments(x.out, x.lse, change, change[..., 0], x.sequences, 64)
    return [Launch("delta, step", spread_kernel, arguments, grid=grid)]
