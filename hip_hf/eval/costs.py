"""What attention costs in floating-point operations (a multiply-add is two), from the settings and the geometry alone.

Counted is what grows with the keys: products of queries with chunk summaries (selection) and with keys and values
(attention). Left out is the pyramid, a few additions per key once, and what is small beside the products: softmax, top-k.
Figures are per query head. Where heads of a group share a selection, each votes with its own rows, so that a head's
part of the selection is the same as when it selects alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

from hip_hf.config import HiPConfig
from hip_hf.methods.base import QueryBlock
from hip_hf.methods.hip import sampled_rows, start_level
from hip_hf.methods.pyramid import make_representative
from hip_hf.reference.sparse import keys_seen


@dataclass(frozen=True)
class Cost:
    """Sums over query rows, for one query head. `dense` is what dense attention takes for the same rows."""

    rows: int = 0
    read: int = 0  # keys
    visible: int = 0  # keys
    selection: int = 0  # FLOPs
    attention: int = 0  # FLOPs
    dense: int = 0  # FLOPs

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """Selection and attention together, as a share of dense attention."""
        return (self.selection + self.attention) / self.dense


def selection_flops(config: HiPConfig, block: QueryBlock, dim: int) -> int:
    """FLOPs of choosing the key blocks of one query block, whose middle exceeds the budget; `dim` is the head dim."""
    if config.method == "streaming":
        return 0
    if config.method == "oracle":
        return block.rows * (block.last + 1) * 2 * dim
    if config.method != "hip":
        raise ValueError(f"method: got {config.method!r}, allowed: hip | oracle | streaming")
    budget, voters = config.budget // config.block_k, len(sampled_rows(config, block))
    options = config.method_options()
    representative = make_representative(config.representative, options.weight, options.outliers)
    features = representative.features(torch.empty(1, dim)).shape[-1] * representative.per_chunk

    level = start_level(config, block.low, block.high)
    candidates = (block.high >> level) - (-(-block.low >> level))
    scored = candidates
    for _ in range(level):
        # the halves of what is kept, and a chunk at either edge of the middle
        candidates = 2 * min(config.beam * budget, candidates) + 2
        scored += candidates
    exact = min(config.rescore * budget, candidates) * config.block_k if config.rescore > 1 else 0
    return voters * 2 * (scored * features + exact * dim)


def block_cost(config: HiPConfig, block: QueryBlock, dim: int, value_dim: int, sliding_window: int | None = None) -> Cost:
    """Cost of one query block. Only keys that a row may see count as read, by sparse and dense attention alike."""
    budget = config.budget // config.block_k if config.method != "streaming" else 0
    visible = keys_seen(block.first, block.last, sliding_window)
    fixed = block.sink - block.start - block.window + min(block.middle, budget) * config.block_k
    read = min(keys_seen(block.first, block.last, None) + block.rows * fixed, visible)
    selection = selection_flops(config, block, dim) if block.middle > budget else 0
    per_key = 2 * (dim + value_dim)
    return Cost(block.rows, read, visible, selection, read * per_key, visible * per_key)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    return sum(costs, Cost())
