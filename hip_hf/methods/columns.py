"""What methods share that look at query rows densely, most of them at a few rows of a call, whose
attention they take for everyone's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.geometry import QueryBlock
from hip_hf.methods import base
from hip_hf.methods.ranking import best, squash
from hip_hf.workers import run

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# Query rows whose attention to all keys is held at once.
ROWS_AT_ONCE = 64


def attention_to(
    q: Tensor,
    keys: Tensor,
    position: Tensor,
    key_position: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Dense attention `[..., n, K]`, in fp32 at least, of rows q `[..., n, D]` at the positions
    `position` `[n]` to the keys `[..., K, D]` at `key_position` `[..., K]`; none to later keys."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) * scale) @ keys.to(dtype).transpose(-1, -2)
    squash(logits, softcap)  # before later keys get -inf
    logits.masked_fill_(key_position[..., None, :] > position[:, None], -torch.inf)
    return torch.softmax(logits, dim=-1, out=logits)


def attention_of(
    q: Tensor, keys: Tensor, rows: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Dense attention `[G, n, keys in sight]`, in fp32 at least, of the ascending rows `rows` of
    `q` `[G, Tq, D]`, whose last row sits at the last of the keys `[T, D]`."""
    position = rows + (len(keys) - q.shape[1])
    keys = keys[: int(position[-1]) + 1]
    key_position = torch.arange(len(keys), device=q.device)
    return attention_to(q[:, rows], keys, position, key_position, scale, softcap)


def probe(
    q: Tensor,
    keys: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None,
    take: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Call `take(head, rows, attention)` for every key head and the query rows `rows` `[n]`, a few
    at a time, heads in parallel. q is `[Hkv, G, Tq, D]`, keys are `[Hkv, T, D]`, and attention is
    that of `attention_of`."""

    def head(i: int) -> None:
        for some in rows.split(ROWS_AT_ONCE):
            take(i, some, attention_of(q[i], keys[i], some, scale, softcap))

    run(head, range(len(keys)), q.device)


def block_sums(x: Tensor, block_k: int) -> Tensor:
    """Return the sums `[..., T // block_k]` over the whole blocks of the last dimension of `x`
    `[..., T]`."""
    return x[..., : x.shape[-1] // block_k * block_k].unflatten(-1, (-1, block_k)).sum(-1)


class ColumnSelector(base.Selector):
    """A selector that looks at some rows of a call, once: what a block then chooses costs
    nothing."""

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int]:
        return 0, 0

    def looked_at(self, rows: int, device: torch.device | None = None) -> Tensor:
        """Return which of a call's `rows` query rows are looked at: int64 `[n]`, ascending."""
        raise NotImplementedError

    def cost_of_call(self, rows: int, keys: int, dim: int) -> tuple[int, int]:
        some_rows = self.looked_at(rows).split(ROWS_AT_ONCE)
        parts = [(len(some), int(some[-1]) + keys - rows + 1) for some in some_rows]
        return sum(n * seen for n, seen in parts) * 2 * dim, sum(seen for _, seen in parts) * dim


@dataclass(frozen=True)
class Columns(base.BoundSelector):
    """Scores of key blocks that hold for every query block: `scores` `[Hkv, S, T // block_k]`."""

    config: HiPConfig
    scores: Tensor

    def select(self, heads: slice, blocks: list[QueryBlock]) -> Tensor:
        """Return the best candidates of each query block, `[heads, S, len(blocks), budget]`."""
        each = [self._best(heads, block).sort(dim=-1).values for block in blocks]
        return torch.stack(each, dim=2)

    def _best(self, heads: slice, block: QueryBlock) -> Tensor:
        scores = self.scores[heads, :, block.low : block.high]
        ids = torch.arange(block.low, block.high, device=scores.device).expand(scores.shape)
        return best(scores, ids, self.config.budget_blocks)
