"""The block oracle: the key blocks with the largest true softmax mass. Quadratic; the yardstick for
the others' recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.geometry import QueryBlock, rows_of_blocks
from hip_hf.methods import base
from hip_hf.methods.columns import attention_to
from hip_hf.methods.ranking import best

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


class Selector(base.Selector):
    """Scores every key between sink and window, for every row (no sampling), by its share of the
    whole attention."""

    # every key then counts as just outside the window, the nearer ones too, in all layers
    extends = True

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int]:
        return block.rows * (block.last + 1) * 2 * dim, (block.last + 1) * dim

    def bind(
        self, q: Tensor, keys: Tensor, pyramid: object, scale: float, softcap: float | None
    ) -> Exhaustive:
        return Exhaustive(self.config, q, keys, scale, softcap)


@dataclass(frozen=True)
class Exhaustive(base.BoundSelector):
    """The rule bound to a span: every key is looked at."""

    config: HiPConfig
    q: Tensor
    keys: Tensor
    scale: float
    softcap: float | None

    def select(self, heads: slice, blocks: list[QueryBlock]) -> Tensor:
        config, parts, groups = self.config, [], self.q.shape[1]
        masks_per_kv_head = 1 if config.group_shared else groups
        for block in blocks:
            q = self.q[heads, :, rows_of_blocks([block])].flatten(1, 2)  # [H, G * n, D]
            keys = self.keys[heads, : block.last + 1]
            at = torch.arange(block.last + 1, device=q.device)
            rows = at[block.first :].repeat(groups)
            attention = attention_to(q, keys, rows, at, self.scale, self.softcap)
            mass = attention.unflatten(1, (masks_per_kv_head, -1)).sum(2)  # [H, S, keys]
            searched = mass[..., block.low * config.block_k : block.high * config.block_k]
            scores = searched.unflatten(-1, (-1, config.block_k)).sum(-1)
            ids = torch.arange(block.low, block.high, device=q.device).expand(scores.shape)
            parts.append(best(scores, ids, config.budget_blocks).sort(dim=-1).values)
        return torch.stack(parts, dim=2)


METHOD = base.Method("the true best blocks, quadratic: the yardstick", Selector)
