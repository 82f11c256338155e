"""StreamingLLM (arXiv 2309.17453): sink and window, nothing between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_hf.config import HiPConfig, refuse
from hip_hf.geometry import QueryBlock
from hip_hf.methods import base


@dataclass(frozen=True)
class Options:
    """`recent`: spend the budget on the latest keys before the window, so that as many are read as
    by other methods."""

    recent: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.recent, bool):
            refuse("options['recent']", self.recent, "True or False")


def selected_keys(config: HiPConfig) -> int:
    """Keys beside sink and window that are read at most."""
    return config.budget if base.options_of(config, Options).recent else 0


class Selector(base.Selector):
    """Selects no block at all, or the last ones."""

    reads_pages = True  # it looks at no key
    extends = True

    def __init__(self, config: HiPConfig) -> None:
        super().__init__(config)
        self.budget = config.selected_keys // config.block_k

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int]:
        return 0, 0

    def bind(
        self, q: Tensor, keys: Tensor, pyramid: object, scale: float, softcap: float | None
    ) -> Latest:
        return Latest(1 if self.config.group_shared else q.shape[1], self.budget, q.device)


@dataclass(frozen=True)
class Latest(base.BoundSelector):
    """The last `budget` candidates of every query block."""

    masks_per_kv_head: int
    budget: int
    device: torch.device

    def select(self, heads: slice, blocks: list[QueryBlock]) -> Tensor:
        high = torch.tensor([[block.high] for block in blocks], device=self.device)
        ids = high - torch.arange(self.budget, 0, -1, device=self.device)
        return ids.expand(heads.stop - heads.start, self.masks_per_kv_head, -1, -1)


RECENT = {"options": {"recent": True}}
METHOD = base.Method(
    "nothing (StreamingLLM); with `recent` the budget as a longer window",
    Selector,
    Options,
    selected_keys=selected_keys,
    presets={"streaming": RECENT, "streaming+delta": {**RECENT, "delta": 64}},
)
