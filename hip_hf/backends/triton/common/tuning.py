"""Launch configurations per architecture and head dim: a table (`tuning_table.json`), written by
`benchmarks/tune.py`."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

# Kernel -> target -> head dim up to -> rows, keys, warps, stages.
TILES: dict[str, dict[str, dict[int, list[int]]]] = json.loads(
    Path(__file__).with_name("tuning_table.json").read_text(encoding="utf-8"),
    object_hook=lambda x: {int(key) if key.isdecimal() else key: x[key] for key in x},
)
# Streaming multiprocessors (compute units) assumed where there is no device to ask: an H200's.
PROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """A launch: `rows` of a tile of queries (query rows times heads of the group), `keys` per step,
    warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_two(number: int) -> int:
    """The lowest power of two that is not below `number`. (Triton's own, called on the host,
    unwraps its arguments first.)"""
    return 1 << max(0, number - 1).bit_length()


# Small enough for fp32 on every target.
FULL_PRECISION = Tile(32, 32, 4, 1)


def target_of(x: torch.Tensor) -> str:
    """Return the compilation target of the device that the tensor `x` (of any shape) is on: "sm90",
    "gfx942", ...; CPUs (the interpreter) count as "sm90"."""
    return _target(x.device.index) if x.device.type == "cuda" else "sm90"


@functools.cache
def _target(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def _age(target: str) -> int:
    """Targets of one maker in order of their age: "sm90" before "sm100", "gfx90a" before
    "gfx942"."""
    return int(target[3:], 16) if target.startswith("gfx") else int(target[2:])


@functools.cache
def tile_of(kernel: str, target: str, dim: int, dim_v: int, dtype: torch.dtype) -> Tile:
    """Configuration of `kernel` (a name in the table) for head dims as wide as the wider one.

    A target that is not in the table gets the configuration of the closest older one of its maker;
    one that is older than all of them, the smallest of its maker's.
    """
    if dtype == torch.float32:
        return FULL_PRECISION
    width, tiles = max(dim, dim_v), {}
    for name, dims in TILES[kernel].items():
        if name[:2] == target[:2]:
            tiles[name] = Tile(*dims[min((d for d in dims if d >= width), default=max(dims))])
    older = [name for name in tiles if _age(name) <= _age(target)]
    if older:
        return tiles[max(older, key=_age)]
    # shared memory holds query rows, and keys and values of every stage
    return min(tiles.values(), key=lambda tile: tile.rows + 2 * tile.keys * tile.stages)


def tile_for(kernel: str, q: torch.Tensor, dim_v: int, target: str | None = None) -> Tile:
    """`tile_of` for queries like q `[..., D]` on their device, or on `target` if one is given."""
    return tile_of(kernel, target or target_of(q), q.shape[-1], dim_v, q.dtype)


def precision_of(x: torch.Tensor) -> str:
    """Return how `tl.dot` multiplies operands of the dtype of `x` (of any shape). fp32 must stay
    fp32."""
    if x.dtype != torch.float32:
        return "tf32"
    return full_precision("gfx" if torch.version.hip else "sm")


def full_precision(target: str) -> str:
    """fp32 products on `target`: three of tf32 where matrix units know no fp32."""
    return "ieee" if target.startswith("gfx") else "tf32x3"


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: torch.Tensor) -> int:
    """Return the number of streaming multiprocessors of the device that the tensor `x` (of any
    shape) is on."""
    return _processors(x.device.index) if x.device.type == "cuda" else PROCESSORS
