"""Quest (arXiv 2406.10774): every key block is scored by the largest `q . k` that its element-wise
minimum and maximum allow.

That is the tree search without a tree: the bound as representative, every block a candidate. O(T /
block_k) per query block. Quest itself selects in decode only; here prefill does, too, with the
votes and the score of the settings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hip_hf.methods import base, hip

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


def as_tree(config: HiPConfig) -> HiPConfig:
    """The settings of the tree search that do the same."""
    # with an interval of one step, the tree search takes the best blocks and nothing but them
    flat = dict(
        representative="minmax", coarsest=config.block_k, beam=1, rescore=1, decode_refresh=1
    )
    return replace(config, method="hip", options={}, **flat)  # type: ignore[arg-type]


class Selector(hip.Selector):
    """The best blocks by their bound."""

    def __init__(self, config: HiPConfig) -> None:
        super().__init__(as_tree(config))


METHOD = base.Method(
    "blocks by the bound of their keys' minimum and maximum, O(T / block_k)", Selector
)
