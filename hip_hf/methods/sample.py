"""SampleAttention (arXiv 2406.15486), two stages: dense attention of a few query rows, spread
evenly over the call, finds the key columns with the most mass; every row then reads those (and sink
and window).

The paper keeps as many columns as reach a share of the mass; here `budget` says how many, as for
every method. It serves prefill; a decode step is its own sample. Costs `rows` of dense attention. A
row's selection depends on the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hip_hf.config import refuse
from hip_hf.methods import base
from hip_hf.methods.columns import Columns, ColumnSelector, block_sums, probe


@dataclass(frozen=True)
class Options:
    """`rows`: the share of the query rows that is sampled, evenly spaced, the last one always; the
    paper's is 0.05."""

    rows: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.rows, (int, float)) or not 0 < self.rows <= 1:
            refuse("options['rows']", self.rows, "above 0, at most 1")


class Selector(ColumnSelector):
    """The columns with the most sampled mass."""

    def looked_at(self, rows: int, device: torch.device | None = None) -> Tensor:
        share = base.options_of(self.config, Options).rows
        stride = rows if share * rows <= 1 else round(1 / share)
        return torch.arange((rows - 1) % stride, rows, stride, device=device)

    def bind(
        self, q: Tensor, keys: Tensor, pyramid: object, scale: float, softcap: float | None
    ) -> Columns:
        masks_per_kv_head = 1 if self.config.group_shared else q.shape[1]
        columns = torch.zeros(
            len(keys), masks_per_kv_head, keys.shape[1], dtype=torch.float32, device=q.device
        )

        def take(head: int, rows: Tensor, attention: Tensor) -> None:
            mass = attention.sum(1).unflatten(0, (masks_per_kv_head, -1)).sum(1)
            columns[head, :, : attention.shape[-1]] += mass

        probe(q, keys, self.looked_at(q.shape[2], q.device), scale, softcap, take)
        return Columns(self.config, block_sums(columns, self.config.block_k))


METHOD = base.Method(
    "SampleAttention: the strongest columns of a sample of rows", Selector, Options
)
