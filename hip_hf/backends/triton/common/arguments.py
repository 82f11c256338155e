"""What the kernels are told about a call beside its tensors and sequences: what rows read, and how
products become logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hip_hf.backends.triton.common.tuning import Tile, power_of_two
from hip_hf.rope import Positions

# A window that reaches back to the first key of any sequence: dense attention.
EVERYTHING = 2**30


@dataclass(frozen=True)
class Reads:
    """What every query row reads.

    `indices` int32 `[S, H', Nq, n]`: sorted key blocks between sink and window, of which `counts`
    int32 `[S, H', Nq]` count; `H'` is Hkv where the group shares a selection, else Hq; None: sink
    and window only. `sink` and `window` in keys. `windows` int32 `[S, Nq]`, rows at any stride:
    where the window starts, if it is not laid out anew (decode between refreshes).
    """

    block_q: int
    block_k: int
    sink: int
    window: int
    indices: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    windows: torch.Tensor | None = None


@dataclass(frozen=True)
class Logits:
    """How products become logits. `sinks` `[Hq]`: one extra logit per query head. `positions`: q
    and k are not rotated."""

    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: torch.Tensor | None = None
    positions: Positions | None = None


def dense_reads(block_q: int = 64) -> Reads:
    """Every key up to the row itself."""
    return Reads(block_q, 16, 0, EVERYTHING)


def configuration(kernel: str, logits: Logits) -> str:
    """Name in the table of launches: turning a tile of queries or keys takes four registers where
    its numbers take one."""
    return kernel if logits.positions is None else f"{kernel} extended"


def rows_of_program(tile: Tile, group: int, block_q: int) -> int:
    """Query rows of a program that attends for `group` heads of each; tensor cores take 16 rows
    times heads at least."""
    padded = power_of_two(group)
    return max(min(tile.rows // padded, power_of_two(block_q)), 16 // padded, 1)
