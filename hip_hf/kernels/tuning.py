"""Launch configurations per architecture and head dim."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Parts into which the keys of a row are split at most, a power of two: what one program of the combine step takes.
MOST_SPLITS = 64
# Streaming multiprocessors (compute units) assumed where there is no device to ask: an H200's.
PROCESSORS = 132


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


def decode_tile(target: str, dim: int, dtype: torch.dtype) -> Tile:
    return Tile(16, 64, 4, 3)


def query_gradient_tile(target: str, dim: int, dim_v: int, dtype: torch.dtype) -> Tile:
    return Tile(128, 64, 8, 2)


def key_gradient_tile(target: str, dim: int, dim_v: int, dtype: torch.dtype) -> Tile:
    return Tile(64, 64, 4, 2)


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: torch.Tensor) -> int:
    """Streaming multiprocessors of the device that `x` is on."""
    return _processors(x.device.index) if x.device.type == "cuda" else PROCESSORS
