"""The GPUs that `kernel_costs` knows, an attention layer as their kernels see it, and what a kernel
costs there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

import torch

from hip_hf.backends.triton.attention.decode import kernel_of, splits_of
from hip_hf.backends.triton.common.arguments import rows_of_program
from hip_hf.backends.triton.common.tuning import Tile, tile_of
from hip_hf.config import HiPConfig
from hip_hf.geometry import mask_heads

# Dense bf16 TFLOP/s with fp32 sums, and TB/s of device memory: the makers' data sheets.
GPUS = {
    "H200": (989.0, 4.8),
    "H100": (989.0, 3.35),
    "A100": (312.0, 2.0),
    "RTX 4090": (165.2, 1.008),
}
GPU_TARGETS = {"H200": "sm90", "H100": "sm90", "A100": "sm80", "RTX 4090": "sm89"}
# Streaming multiprocessors (of an H100 those of the SXM module, as the figures above).
GPU_PROCESSORS = {"H200": 132, "H100": 132, "A100": 108, "RTX 4090": 128}
# Bytes of a number in fp32: partial results, states of summaries, log-sum-exps, hashes.
FP32_BYTES = torch.float32.itemsize


def gpu_of(device: str) -> str | None:
    """Which of `GPUS` a device is whose driver calls it that; None if it is none of them."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu}\b", device)), None)


@dataclass(frozen=True)
class Shape:
    """One attention layer: query and key heads, head dim, bytes of an element; `target`: whose
    launch configurations count. In decode steps `sequences` share the device's `processors`, and
    what would idle works with another on the same."""

    query_heads: int = 32
    key_heads: int = 8
    dim: int = 128
    size: int = 2
    target: str = GPU_TARGETS["H200"]
    processors: int = GPU_PROCESSORS["H200"]
    sequences: int = 1

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.query_heads // self.key_heads

    @property
    def row(self) -> int:
        """Bytes of a query row of all heads."""
        return self.query_heads * self.dim * self.size

    @property
    def result(self) -> int:
        """Bytes of a row's output and log-sum-exp of all heads, in fp32."""
        return self.query_heads * (self.dim + 1) * FP32_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """Return a dtype whose elements have `size` bytes."""
        return torch.float32 if self.size == torch.float32.itemsize else torch.bfloat16

    def lists(self, config: HiPConfig) -> int:
        """Selections of a query block."""
        return mask_heads(config, self.query_heads, self.key_heads)

    def tile(self, kernel: str) -> Tile:
        """Return the launch configuration of `kernel` for these heads."""
        return tile_of(kernel, self.target, self.dim, self.dim, self.dtype)

    def rows(self, kernel: str, block_q: int, lists: int) -> int:
        """Rows of a query block that a program of `kernel` takes."""
        return rows_of_program(self.tile(kernel), self.query_heads // lists, block_q)

    def row_tiles(self, kernel: str, block_q: int, lists: int) -> int:
        """Tiles into which `kernel` cuts the rows of a query block; each gathers its keys for
        itself."""
        return ceil(block_q / self.rows(kernel, block_q, lists))

    def product_flops(self, pairs: float) -> float:
        """Return the FLOPs of one product of `pairs` pairs of a row and a key, of all query
        heads."""
        return 2 * pairs * self.query_heads * self.dim

    def key_bytes(self, keys: float) -> float:
        """Return the bytes of K alone of `keys` keys of all key heads."""
        return keys * self.key_heads * self.dim * self.size

    def number_bytes(self, rows: float) -> float:
        """Return the bytes of one fp32 number for each query head of `rows` rows."""
        return rows * self.query_heads * FP32_BYTES

    def gathered(self, kernel: str, block_q: int, lists: int, keys: float) -> float:
        """Bytes of K and V that the tiles of a query block read, `keys` of them each."""
        return self.row_tiles(kernel, block_q, lists) * lists * keys * 2 * self.dim * self.size

    def splits(self, keys: int, rows: int = 1, block_q: int = 1) -> int:
        """Return how many programs share the `keys` of a tile of `rows` rows of each sequence
        (`backends/triton/attention/decode.py`)."""
        tile, heads = self.tile(kernel_of(block_q)), self.sequences * self.key_heads
        return splits_of(tile, self.group, heads, keys, rows, block_q, self.processors)

    def rows_moved(self, rows: float, splits: int) -> float:
        """Return the bytes of `rows` query rows whose keys `splits` programs share: q, which each
        of them reads, and the output or each one's part of it."""
        return rows * (splits * self.row + (splits * self.result if splits > 1 else self.row))


@dataclass(frozen=True)
class KernelCost:
    """FLOPs of matrix products, and bytes from device memory if nothing that was read stays in a
    cache."""

    flops: float
    bytes: float

    def __add__(self, other: KernelCost) -> KernelCost:
        return KernelCost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> KernelCost:
        """Return `count` times this cost."""
        return KernelCost(self.flops * count, self.bytes * count)

    def milliseconds(self, gpu: str) -> float:
        """Return the milliseconds that `gpu` needs at least: those of its matrix products or those
        of its memory, whichever are more."""
        _, terabytes = GPUS[gpu]
        return max(self.products(gpu), 1e3 * self.bytes / (terabytes * 1e12))

    def products(self, gpu: str) -> float:
        """Milliseconds of the matrix products alone: what is left if every gather is served by a
        cache."""
        return 1e3 * self.flops / (GPUS[gpu][0] * 1e12)


NO_COST = KernelCost(0, 0)
