"""Qwen2, Qwen2-MoE (Llama's layer with biases), Qwen3 and Qwen3-MoE (q and k normalised per head,
before RoPE)."""

from __future__ import annotations

from typing import Any

import torch

from hip_hf.integration.patches import llama
from hip_hf.integration.patches.base import Patcher, by_heads


def project(module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v `[B, heads, T, D]` of hidden states `[B, T, hidden size]`; q and k normalised."""
    q = module.q_norm(by_heads(module, module.q_proj(hidden)))
    k = module.k_norm(by_heads(module, module.k_proj(hidden)))
    v = by_heads(module, module.v_proj(hidden))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


PATCHERS = {
    "qwen2": Patcher("Qwen2Attention", llama.project),
    "qwen2_moe": Patcher("Qwen2MoeAttention", llama.project),
    "qwen3": Patcher("Qwen3Attention", project),
    "qwen3_moe": Patcher("Qwen3MoeAttention", project),
}
