"""What a patcher of a family says: how an attention layer is put together
(`patched_forward.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def own_window(module: Any) -> int | None:
    """The width of the layer's window, where most families keep it; None if it has none."""
    return getattr(module, "sliding_window", None)


@dataclass(frozen=True)
class Patcher:
    """How to patch one family.

    `attention`: name of its attention class. `project(module, hidden [B, T, hidden size])` -> q
    `[B, Hq, T, D]`, k and v `[B, Hkv, T, D]`, normalised if the family does so, not rotated.
    `sliding_window(module)`: of the layer. The rotation is `apply_rotary_pos_emb` of the modeling
    file, which must turn halves of the head dim (Llama's layout).
    """

    attention: str
    project: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    sliding_window: Callable[[Any], int | None] = own_window


def by_heads(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`[B, T, heads * D]` -> `[B, T, heads, D]`."""
    return x.view(*x.shape[:-1], -1, module.head_dim)
