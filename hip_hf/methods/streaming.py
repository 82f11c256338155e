"""StreamingLLM (arXiv 2309.17453): sink and window, nothing between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hip_hf.methods.base import QueryBlock

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


class Selector:
    """Selects no block at all."""

    def __init__(self, config: HiPConfig) -> None:
        self.config = config
        self.budget = 0

    def make_pyramid(self, dtype: torch.dtype) -> None:
        return None

    def bind(self, q: torch.Tensor, keys: torch.Tensor, pyramid: None, scale: float, softcap: float | None) -> NoBlocks:
        return NoBlocks(1 if self.config.group_shared else q.shape[1], q.device)


class NoBlocks:
    def __init__(self, shares: int, device: torch.device) -> None:
        self.shares, self.device = shares, device

    def select(self, heads: slice, blocks: list[QueryBlock]) -> torch.Tensor:
        count = heads.stop - heads.start
        return torch.empty(count, self.shares, len(blocks), 0, dtype=torch.long, device=self.device)
