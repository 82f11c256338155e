"""Llama."""

from __future__ import annotations

from typing import Any

import torch

from hip_hf.integration.patches.base import Patcher, by_heads


def project(module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v `[B, heads, T, D]` of hidden states `[B, T, hidden size]`."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (by_heads(module, layer(hidden)).transpose(1, 2) for layer in layers)
    return q, k, v


PATCHERS = {"llama": Patcher("LlamaAttention", project)}
