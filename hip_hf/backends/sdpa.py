"""PyTorch's own attention for heads in groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What FlashAttention takes: head dims, and on NVIDIA's GPUs compute capabilities.
FLASH_DIM, FLASH_CAPABILITY = 256, (8, 0)


def grouped_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, seen: Tensor | None = None
) -> Tensor:
    """PyTorch's attention of q `[B, Hq, T, D]` to k `[B, Hkv, T, D]` and v, under the mask `seen`
    if there is one. Where it would make all logits at once only because heads share keys, a call
    for each member of the groups."""
    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = dict(attn_mask=seen, scale=scale, is_causal=causal)
    if groups == 1 or (seen is None and takes_groups(q, v)):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1, **options)
    members = q.unflatten(1, (-1, groups)).unbind(2)
    return torch.stack(
        [F.scaled_dot_product_attention(one, k, v, **options) for one in members], dim=2
    ).flatten(1, 2)


def takes_groups(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch has attention without a mask for such heads in groups that never holds all
    logits: on GPUs FlashAttention alone."""
    if q.device.type != "cuda":
        return True
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.shape[3] == v.shape[3] <= FLASH_DIM:
        return False
    # a graph that is being compiled is for the kernels of `hip_hf`, which ask as much of the device
    return (
        torch.compiler.is_compiling()
        or torch.cuda.get_device_capability(q.device) >= FLASH_CAPABILITY
    )
