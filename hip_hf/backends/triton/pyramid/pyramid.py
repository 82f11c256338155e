"""The pyramid of chunk summaries on a GPU: one flat table per key head, built in one pass over the
keys and extended in place.

Rows are laid out in order (`summaries.py`), capacity is fixed, and how far it reaches is read and
written on the device: building and appending wait for nothing and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hip_hf.backends.triton.common.addressing import KeyValues
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.common.tuning import power_of_two
from hip_hf.backends.triton.pyramid import summaries
from hip_hf.methods.base import options_of
from hip_hf.methods.need import Options

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# A tile is 2 ** TILE_LEVELS blocks: what a program reads at once and keeps in registers.
TILE_LEVELS = 5
# Of the head dim, what a program takes.
DIM_AT_ONCE = 64


def vectors_per_summary(config: HiPConfig) -> int:
    """Of a summary: vectors that are multiplied with q and |q|."""
    return 1 if config.representative == "middle" else 2


def pyramid_constants(config: HiPConfig, dim: int, block_q: int, append: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernels of `config.representative`."""
    kind = summaries.MIDDLE if config.representative == "middle" else summaries.CENTRE
    sizes = dict(BLOCK_Q=block_q, BLOCK_K=config.block_k, DIM=dim, LEVELS=TILE_LEVELS)
    # one program that does everything needs more registers than one that makes a tile
    warps = 8 if append else 4
    return sizes | dict(KIND=kind.value, BD=min(DIM_AT_ONCE, power_of_two(dim)), num_warps=warps)


@dataclass
class KeyPyramid:
    """Summaries of the first `built` key blocks of each sequence and key head.

    `table` `[S, Hkv, rows, width]`, in the keys' dtype: chunk `i` of level `l` is row
    `((2 * i + 1) << l) - 1`. `states` fp32 `[S, Hkv, rows, state]`: what parents are merged from.
    `built` int32 `[S, programs]`, one entry per program that extends it. Memory: about
    `2 * width / (block_k * D)` of the keys'.
    """

    config: HiPConfig
    table: torch.Tensor
    states: torch.Tensor
    built: torch.Tensor

    @staticmethod
    def empty(
        config: HiPConfig,
        sequences: int,
        heads: int,
        dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KeyPyramid:
        """Nothing is built yet; for up to `capacity` keys a sequence."""
        blocks = max(1, capacity // config.block_k)
        tiles, parts = max(1, blocks >> TILE_LEVELS), vectors_per_summary(config)
        programs = heads * -(-dim // pyramid_constants(config, dim, 1, False)["BD"])
        table = (sequences, heads, 2 * blocks, parts * dim)
        states = (sequences, heads, 2 * tiles, (parts + 1) * dim)
        return KeyPyramid(
            config,
            torch.empty(table, dtype=dtype, device=device),
            torch.empty(states, dtype=torch.float32, device=device),
            torch.zeros(sequences, programs, dtype=torch.int32, device=device),
        )

    @property
    def dim(self) -> int:
        """Of the keys' heads."""
        return self.table.shape[3] // vectors_per_summary(self.config)

    @property
    def blocks(self) -> int:
        """Key blocks of a sequence that there is room for."""
        return self.table.shape[2] // 2

    @property
    def nbytes(self) -> int:
        """Return the memory of the summaries in bytes."""
        return self.table.nbytes + self.states.nbytes + self.built.nbytes

    def truncate(self, blocks: int | torch.Tensor) -> None:
        """Forget all but the first `blocks` blocks (of every sequence, or an int32 tensor `[S]`).
        Nothing waits."""
        limit = blocks[:, None] if isinstance(blocks, torch.Tensor) else blocks
        self.built.clamp_(max=limit)

    def reorder(self, index: torch.Tensor) -> None:
        """Sequence `i` continues what sequence `index[i]` was; int64 `[S']`. Copies the table, as
        the cache copies its keys."""
        self.table, self.states, self.built = (
            x.index_select(0, index) for x in (self.table, self.states, self.built)
        )

    def take(self, old: KeyPyramid) -> None:
        """Go on where a pyramid of smaller capacity was; rows keep their places."""
        self.table[:, :, : old.table.shape[2]] = old.table
        self.states[:, :, : old.states.shape[2]] = old.states
        self.built.copy_(old.built)

    def extend(self, kv: KeyValues, sequences: Sequences, block_q: int, append: bool) -> None:
        """Reach as far as the call's query blocks of `block_q` rows need. `append`: few keys are
        new (decode), so one launch does it all; otherwise tiles are built side by side."""
        config, blocks = self.config, sequences.max_keys // self.config.block_k
        block_table, stride_table = kv.table()
        weight = 1.0 if config.representative == "minmax" else options_of(config, Options).weight
        arguments = (
            self.table, self.states, self.built, kv.k, block_table, sequences.table,
            self.table.stride(0), self.table.stride(1), self.states.stride(0),
            self.states.stride(1), *kv.strides(kv.k), stride_table, sequences.table.stride(0),
            config.window, weight)  # fmt: skip
        fixed = pyramid_constants(config, self.dim, block_q, append) | dict(PAGE_SIZE=kv.page_size)
        programs, count = self.built.shape[1], sequences.count
        if not append and blocks:
            tiles = -(-blocks >> TILE_LEVELS)
            summaries.tiles_kernel[(tiles, programs, count)](*arguments, **fixed)
        summaries.append_kernel[(programs, count)](*arguments, BUILD=append, **fixed)
