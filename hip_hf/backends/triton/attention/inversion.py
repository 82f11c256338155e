"""Which query blocks read a tile of keys: lists of selected key blocks, inverted on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Inverted:
    """Which query blocks selected something of each tile of keys.

    Entries `offsets[i]` to `offsets[i + 1] - 1` (int64 `[S * H' * tiles + 1]`) belong to tile
    `i % tiles` of list `i // tiles`; `who` int32: the query block, ascending; `what` int32: bit `j`
    is set where it selected the tile's `j`-th key block.
    """

    who: torch.Tensor
    what: torch.Tensor
    offsets: torch.Tensor


def invert(indices: torch.Tensor, counts: torch.Tensor, per_tile: int, tiles: int) -> Inverted:
    """Invert lists of key blocks, indices `[S, H', Nq, n]` and counts `[S, H', Nq]`, into lists per
    tile of `per_tile` <= 31 key blocks. All on the device, always in the same order."""
    sequences, lists, blocks, most = indices.shape
    device = indices.device
    listed = torch.arange(most, device=device) < counts[..., None]
    tile = torch.where(listed, indices // per_tile, -1)
    bit = torch.where(listed, 1 << (indices % per_tile), 0).int()
    # a list is sorted, so what it has of one tile stands together: its first entry gathers the bits
    # of the others
    what = bit.clone()
    for j in range(1, min(per_tile, most)):
        what[..., :-j] += torch.where(tile[..., j:] == tile[..., :-j], bit[..., j:], 0)
    leads = listed.clone()
    leads[..., 1:] &= tile[..., 1:] != tile[..., :-1]
    owner = torch.arange(sequences * lists, device=device).view(sequences, lists, 1, 1) * tiles
    owner = torch.where(leads, owner + tile, sequences * lists * tiles).flatten()
    owner, order = owner.sort(stable=True)
    offsets = torch.searchsorted(owner, torch.arange(sequences * lists * tiles + 1, device=device))
    who = (order // most % blocks).int()
    return Inverted(who, what.flatten()[order], offsets)
