"""What a method offers: a selector, and the rule that it binds to the queries and keys of one span."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from hip_hf.cache.pages import KeyRows
    from hip_hf.config import HiPConfig
    from hip_hf.geometry import QueryBlock
    from hip_hf.rope import Positions


class Bound(Protocol):
    """A selection rule bound to the queries and keys of one span."""

    def select(self, heads: slice, blocks: list[QueryBlock]) -> torch.Tensor:
        """Sorted indices int64 `[heads, S, len(blocks), budget]` of the key blocks that each query block reads.

        `heads` are key heads; `S` is 1 where the group shares its mask, else the number of query heads per key head.
        Every given query block has a middle of more than `budget` blocks; smaller ones are read whole. Where the selector
        `asks_need`, a third argument: `near` `[heads, G, rows]`, log-sum-exp of the blocks' rows over what they always read.
        """


class Selector(Protocol):
    """A method: says which key blocks each query block reads. `budget`: blocks it picks at most.

    With an attribute `reads_pages` that is true, `bind` and the pyramid may get `PagedKeys`; else a cache in pages is gathered.
    With an attribute `asks_need` that is true, its rule knows how much each row attends to what it always reads.
    With an attribute `extends` that is true, it works under context extension: `bind` then gets keys that are not rotated, and q
    rotated as if all keys were just outside the window. What it binds has `chunk_indexed(positions)`, the same for the first
    layers, where chunks count their distance from the window (`rope.py`); `Unplaced` where nothing depends on that.
    """

    budget: int

    def __init__(self, config: HiPConfig) -> None: ...

    def make_pyramid(self, dtype: torch.dtype) -> Any:
        """An empty pyramid of summaries in `dtype`, or None if the method keeps none. It is asked for what `Pyramid` has
        (`methods/pyramid.py`): `block_k`, `blocks`, `shared`, `nbytes`, `copy`, `writable`, `extend` and `truncate`."""

    def bind(self, q: torch.Tensor, keys: KeyRows, pyramid: Any, scale: float, softcap: float | None) -> Bound:
        """q `[Hkv, G, rows, D]` and keys `[Hkv, T, D]` of one span; `pyramid` covers every query block's middle."""


class Unplaced:
    """What bound rules share that look at no chunks, which could be placed."""

    def chunk_indexed(self, positions: Positions) -> Any:
        return self


class Unsummarised:
    """What selectors without a pyramid share."""

    def __init__(self, config: HiPConfig) -> None:
        self.config = config
        self.budget = config.budget_blocks

    def make_pyramid(self, dtype: torch.dtype) -> None:
        return None
