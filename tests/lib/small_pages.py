"""Cache layers of short pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hip_hf.cache.offload import OffloadedStore
from hip_hf.cache.pages import Store
from hip_hf.cache.pool import PagePool
from hip_hf.config import HiPConfig
from hip_hf.integration.paged_layer import PagedLayer

PAGE = 8
MOST = 120  # keys


class SmallPages(PagedLayer):
    """A cache layer whose pages hold few tokens, so that short contexts have many."""

    def make_pool(self, keys: torch.Tensor, values: torch.Tensor) -> PagePool:
        sizes = [(x.shape[1], x.shape[3], x.dtype, x.device, PAGE) for x in (keys, values)]
        if self.device_pages is None:
            return PagePool(
                Store(*sizes[0]), Store(*sizes[1]), one_piece=self.offload_to == "one piece"
            )
        return PagePool(*(OffloadedStore(*size, "cpu", self.device_pages, 2) for size in sizes))


def make_layer(config: HiPConfig, kind: str) -> SmallPages:
    model: Any = SimpleNamespace(_attn_implementation="hip", hip=config.to_dict())
    most = MOST // PAGE + 1
    pages = {
        "pages": (None, None),
        "one piece": ("one piece", None),
        "offloaded": ("cpu", most),
        "small pools": ("cpu", 5),
    }
    return SmallPages(model, *pages[kind])
