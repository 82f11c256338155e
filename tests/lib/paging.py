"""Pages of keys and values as continuous batching lays them out."""

from __future__ import annotations

import torch
from interpreter import DEVICE

from hip_hf.cache.pages import BlockTable, PagedTensor
from hip_hf.integration.continuous_batching import TokenMajorStore

PAGE = 16


def token_major(k: torch.Tensor, v: torch.Tensor, pages: int) -> tuple[PagedTensor, PagedTensor]:
    """As in continuous batching, `[tokens, Hkv, D]`: pages in random order, and a last one that is
    not whole."""
    count = -(-k.shape[2] // PAGE)
    order = torch.randperm(pages)[: len(k) * count].view(len(k), count)
    tables, found = [BlockTable(row.tolist()) for row in order], []
    for x in (k, v):
        rows = torch.full((pages * PAGE + 3, x.shape[1], x.shape[3]), torch.nan, dtype=x.dtype)
        for b in range(len(x)):
            for token in range(x.shape[2]):
                rows[order[b, token // PAGE] * PAGE + token % PAGE] = x[b, :, token]
        found.append(PagedTensor(TokenMajorStore(rows.to(DEVICE), PAGE), tables, x.shape[2]))
    return tuple(found)  # type: ignore[return-value]
