"""Launch configurations per architecture and head dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """A launch: `rows` of a tile of queries (query rows times heads of the group), `keys` per step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def target_of(x: torch.Tensor) -> str:
    """The compilation target of the device that `x` is on: "sm90", "gfx942", ...; CPUs (the interpreter) count as "sm90"."""
    if x.device.type != "cuda":
        return "sm90"
    properties = torch.cuda.get_device_properties(x.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def attention_tile(target: str, dim: int, dim_v: int, dtype: torch.dtype) -> Tile:
    return Tile(128, 64, 8, 2)
