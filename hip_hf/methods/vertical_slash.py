"""The dynamic vertical-slash pattern of MInference (arXiv 2407.02490): the last query rows of a
call are attended densely; the key columns (*vertical*) and the distances to the query (*slash*, a
diagonal) with the most of their mass are kept.

Here both fill one budget of key blocks: `vertical` of it goes to the best columns, the rest to the
blocks that the strongest diagonals cross within the query block. Made for prefill; a decode step
takes itself for the last rows, which costs as much as dense attention's scores. A row's selection
depends on the end of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_hf.config import HiPConfig, refuse
from hip_hf.geometry import QueryBlock
from hip_hf.methods import base
from hip_hf.methods.columns import Columns, ColumnSelector, block_sums, probe
from hip_hf.methods.ranking import best


@dataclass(frozen=True)
class Options:
    """`rows`: the last query rows, which are looked at; the paper's are 64. `vertical`: share of
    the budget for columns."""

    rows: int = 64
    vertical: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or self.rows < 1:
            refuse("options['rows']", self.rows, "an integer >= 1")
        if not isinstance(self.vertical, (int, float)) or not 0 <= self.vertical <= 1:
            refuse("options['vertical']", self.vertical, "0 to 1")


class Selector(ColumnSelector):
    """The strongest columns and diagonals."""

    def looked_at(self, rows: int, device: torch.device | None = None) -> Tensor:
        last = base.options_of(self.config, Options).rows
        return torch.arange(max(0, rows - last), rows, device=device)

    def bind(
        self, q: Tensor, keys: Tensor, pyramid: object, scale: float, softcap: float | None
    ) -> VerticalSlash:
        masks_per_kv_head, tokens = 1 if self.config.group_shared else q.shape[1], keys.shape[1]
        shape = (len(keys), masks_per_kv_head, tokens)
        columns = torch.zeros(shape, dtype=torch.float32, device=q.device)
        diagonals = torch.zeros(shape, dtype=torch.float64, device=q.device)

        def take(head: int, rows: Tensor, attention: Tensor) -> None:
            attention = attention.unflatten(0, (masks_per_kv_head, -1)).sum(1)  # [S, n, T]
            columns[head, :, : attention.shape[-1]] += attention.sum(1)
            for i, row in enumerate(rows.tolist()):
                seen = tokens - q.shape[2] + row + 1
                diagonals[head, :, :seen] += attention[:, i, :seen].flip(-1)

        probe(q, keys, self.looked_at(q.shape[2], q.device), scale, softcap, take)
        return VerticalSlash(self.config, block_sums(columns, self.config.block_k), diagonals)


class VerticalSlash(Columns):
    """Columns, and diagonals: `[Hkv, S, T]`, mass by distance between query and key."""

    def __init__(self, config: HiPConfig, scores: Tensor, diagonals: Tensor) -> None:
        super().__init__(config, scores)
        # sums over all smaller distances, and sums of those: what a query block's rows get from a
        # key block, in four looks
        zero = diagonals.new_zeros(*diagonals.shape[:2], 1)
        once = torch.cat([zero, diagonals.cumsum(-1)], dim=-1)
        object.__setattr__(self, "sums", torch.cat([zero, once.cumsum(-1)], dim=-1))

    sums: Tensor

    def _best(self, heads: slice, block: QueryBlock) -> Tensor:
        budget = self.config.budget_blocks
        columns = self.scores[heads, :, block.low : block.high]
        ids = torch.arange(block.low, block.high, device=columns.device).expand(columns.shape)
        share = base.options_of(self.config, Options).vertical
        vertical = best(columns, ids, round(share * budget))
        slash = self.slash(heads, block).scatter(-1, vertical - block.low, -torch.inf)
        return torch.cat([vertical, best(slash, ids, budget - vertical.shape[-1])], dim=-1)

    def slash(self, heads: slice, block: QueryBlock) -> Tensor:
        """Mass of the diagonals that cross each candidate, summed over the query block's rows."""
        sums, size = self.sums[heads], self.config.block_k
        # first keys of the blocks, and the end
        edge = torch.arange(block.low, block.high + 1, device=sums.device) * size
        # over keys from an edge on
        upto = sums[..., block.last + 2 - edge] - sums[..., block.first + 1 - edge]
        return upto[..., :-1] - upto[..., 1:]


METHOD = base.Method(
    "MInference: the strongest columns and diagonals of the last 64 rows", Selector, Options
)
