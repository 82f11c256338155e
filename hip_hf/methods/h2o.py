"""H2O (arXiv 2306.14048): keys are evicted for good, those with the least attention accumulated so
far go first.

Of the key blocks that have left the window, `budget` stay; whenever one joins them, the block with
the least *accumulated mass* goes and does not come back. Mass is what the query blocks so far gave
to the keys they read (their voting rows, `query_stride`), so a selection depends on earlier rows
only. With a kept state decode goes on from there, and steps that select anew accumulate. Without
history (a first call in the middle, after a crop) the first query block looks at every key. One
pass over the query blocks, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.geometry import DECODE_ROWS, QueryBlock, Span, query_blocks
from hip_hf.methods import base
from hip_hf.methods.columns import attention_to
from hip_hf.methods.ranking import best, sampled_rows

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.problem import AttentionProblem


def dense_reason(problem: AttentionProblem, config: HiPConfig, decoding: bool) -> tuple[str, bool]:
    """Why a call goes dense, and whether for want of support."""
    if problem.sliding_window is not None and problem.sliding_window < problem.longest:
        return f"h2o has no sliding window ({problem.sliding_window})", True
    return "", False


class History:
    """What has been read so far; it stands where other methods keep their pyramid.

    `mass` `[Hkv, S, blocks]`: accumulated attention of every key block. `kept` `[Hkv, S, n]`: the
    blocks that are still there, of those before block `joined`; None without history.
    """

    def __init__(self, block_k: int) -> None:
        self.block_k = block_k
        self.blocks = self.joined = 0
        self.shared = False
        self.mass: Tensor | None = None
        self.kept: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of masses and of what is kept."""
        return sum(table.nbytes for table in (self.mass, self.kept) if table is not None)

    def copy(self) -> History:
        """Return a copy that later selections can change."""
        other = History(self.block_k)
        other.blocks, other.joined, other.kept = self.blocks, self.joined, self.kept
        other.mass = None if self.mass is None else self.mass.clone()
        return other

    def writable(self, blocks: int) -> History:
        """Itself, or a copy where several batch rows refer to it: every selection changes it."""
        return self.copy() if self.shared else self

    def extend(self, keys: Tensor, blocks: int) -> None:
        """Reach `blocks` key blocks. Keys `[Hkv, T, D]` are not read: mass comes from selecting."""
        self.blocks = max(self.blocks, blocks)

    def truncate(self, blocks: int) -> None:
        """What was evicted on account of tokens that are gone cannot be undone: forget
        everything."""
        self.blocks = blocks
        self.mass = self.kept = None


class Selector(base.Selector):
    """The blocks that have not been evicted."""

    looks_always = True

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int]:
        picked = min(block.num_candidates, self.budget) * self.config.block_k
        keys = block.sink_end + picked + block.last + 1 - block.window_start
        return len(sampled_rows(block, self.config.query_stride)) * keys * 2 * dim, keys * dim

    def make_pyramid(self, dtype: torch.dtype) -> History:
        return History(self.config.block_k)

    def bind(
        self, q: Tensor, keys: Tensor, pyramid: object, scale: float, softcap: float | None
    ) -> HeavyHitters:
        assert isinstance(pyramid, History)
        return HeavyHitters(self.config, q, keys, pyramid, scale, softcap)


class HeavyHitters(base.BoundSelector):
    """The rule bound to a span. Its query blocks are decided in order, each by what those before it
    have kept."""

    def __init__(
        self,
        config: HiPConfig,
        q: Tensor,
        keys: Tensor,
        history: History,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.config, self.q, self.keys, self.scale, self.softcap = config, q, keys, scale, softcap
        self.chosen: dict[int, Tensor] = {}  # by the query block's first position
        (heads, groups, rows, _), tokens = q.shape, keys.shape[1]
        self.masks_per_kv_head = 1 if config.group_shared else groups
        size = -(-tokens // config.block_k)
        shape = (heads, self.masks_per_kv_head, size)
        mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
        if history.mass is not None:
            mass[..., : history.mass.shape[-1]] = history.mass
        span = Span(0, 0, tokens, 0, rows, tokens - rows)
        for block in query_blocks(config, span, rows <= DECODE_ROWS):
            kept = self._keep(history, mass, block)
            self.chosen[block.first] = history.kept = kept
            history.joined = block.high
            self._accumulate(mass, block, kept)
        # of every key: whichever are cropped have had their part in it
        history.mass, history.blocks = mass, size

    def select(self, heads: slice, blocks: list[QueryBlock]) -> Tensor:
        return torch.stack([self.chosen[block.first][heads] for block in blocks], dim=2)

    def _range(self, low: int, high: int) -> Tensor:
        every = torch.arange(low, high, device=self.q.device)
        return every.expand(len(self.keys), self.masks_per_kv_head, -1)

    def _keep(self, history: History, mass: Tensor, block: QueryBlock) -> Tensor:
        """The blocks that stay when the window moves on to where this query block has it,
        sorted."""
        budget = self.config.budget_blocks
        # without history, or where the window has moved back, after a crop
        if history.kept is None or history.joined > block.high:
            candidates = self._range(block.low, block.high)
            if candidates.shape[-1] > budget:
                self._accumulate(mass, block, candidates)
        else:
            joining = self._range(max(history.joined, block.low), block.high)
            candidates = torch.cat([history.kept, joining], dim=-1)
        return best(mass.gather(-1, candidates), candidates, budget).sort(dim=-1).values

    def _accumulate(self, mass: Tensor, block: QueryBlock, kept: Tensor) -> None:
        """Add the attention of the query block's voting rows to the mass of what they read."""
        size, device = self.config.block_k, self.q.device
        picked = (kept[..., None] * size + torch.arange(size, device=device)).flatten(-2)
        sink = self._range(0, block.sink_end)
        window = self._range(block.window_start, block.last + 1)
        read = torch.cat([sink, picked, window], dim=-1)
        heads = torch.arange(len(self.keys), device=device)[:, None, None]
        rows = torch.tensor(list(sampled_rows(block, self.config.query_stride)), device=device)
        q, keys = self.q[:, :, rows], self.keys[heads, read]  # [Hkv, G, n, D], [Hkv, S, keys, D]
        position = rows - block.row + block.first
        attention = attention_to(q, keys, position, read, self.scale, self.softcap)
        # [Hkv, S, keys]
        attention = attention.sum(2).unflatten(1, (self.masks_per_kv_head, -1)).sum(2)
        mass.scatter_add_(-1, read // size, attention.to(mass.dtype))


METHOD = base.Method(
    "what has gathered most attention so far; the rest is evicted for good",
    Selector,
    dense_reason=dense_reason,
)
