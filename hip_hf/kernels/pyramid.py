"""The pyramid of chunk summaries on a GPU: one flat table per key head, built in one pass over the keys and extended in place.

Rows are laid out in order (`summaries.py`), capacity is fixed, and how far it reaches is read and written on the device: building
and appending wait for nothing and can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from hip_hf.kernels import outliers, summaries
from hip_hf.kernels.addressing import KeyValues
from hip_hf.kernels.compiled import Launch, Pointer
from hip_hf.kernels.sequences import Sequences

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# A tile is 2 ** TILE_LEVELS blocks: what a program reads at once and keeps in registers.
TILE_LEVELS = 5
# Of the head dim, what a program takes; heads are as wide as they need for outliers, whose distances need it whole.
DIM_AT_ONCE = 64
KINDS = {
    "blend": summaries.CENTRE,
    "minmax": summaries.CENTRE,
    "mean": summaries.MEAN,
    "first": summaries.FIRST,
    "middle": summaries.MIDDLE,
    "last": summaries.LAST,
}


def parts_and_vectors(config: HiPConfig) -> tuple[int, int]:
    """Of a summary: vectors that are multiplied with q and |q|, and vectors of which the best counts."""
    if config.representative == "outliers":
        return 1, 1 + config.method_options().outliers
    return (2, 1) if config.representative in ("blend", "minmax") else (1, 1)


def _states_per_chunk(config: HiPConfig) -> int:
    return {"blend": 3, "minmax": 3, "middle": 2}.get(config.representative, 1)


def constants(config: HiPConfig, dim: int, block_q: int, append: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernels of `config.representative`."""
    # one program that does everything needs more registers than one that makes a tile
    shape = dict(BLOCK_Q=block_q, BLOCK_K=config.block_k, DIM=dim, num_warps=8 if append else 4)
    if config.representative == "outliers":
        count = config.method_options().outliers
        return shape | dict(COUNT=count, N=triton.next_power_of_2(max(config.block_k, 2 * count)), BD=triton.next_power_of_2(dim))
    kind = KINDS[config.representative].value
    return shape | dict(KIND=kind, LEVELS=TILE_LEVELS, BD=min(DIM_AT_ONCE, triton.next_power_of_2(dim)))


class KeyPyramid:
    """Summaries of the first `built` key blocks of each sequence and key head, for up to `capacity` keys a sequence.

    `table` `[S, Hkv, rows, width]`, in the keys' dtype: chunk `i` of level `l` is row `((2 * i + 1) << l) - 1`.
    `states` fp32 `[S, Hkv, rows, state]`: what parents are merged from. `built` int32 `[S, lanes]`, one entry per program that
    extends it. Memory: about `2 * width / (block_k * D)` of the keys'.
    """

    def __init__(
        self, config: HiPConfig, sequences: int, heads: int, dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.heads, self.dim, self.capacity = config, heads, dim, capacity
        blocks = max(1, capacity // config.block_k)
        parts, vectors = parts_and_vectors(config)
        self.outliers = config.representative == "outliers"
        tiles = blocks if self.outliers else max(1, blocks >> TILE_LEVELS)
        lanes = heads if self.outliers else heads * -(-dim // constants(config, dim, 1, False)["BD"])
        self.table = torch.empty(sequences, heads, 2 * blocks, parts * vectors * dim, dtype=dtype, device=device)
        self.states = torch.empty(
            sequences, heads, 2 * tiles, _states_per_chunk(config) * dim, dtype=torch.float32, device=device
        )
        self.built = torch.zeros(sequences, lanes, dtype=torch.int32, device=device)

    def truncate(self, blocks: int | torch.Tensor) -> None:
        """Forget all but the first `blocks` blocks (of every sequence, or an int32 tensor `[S]`). Nothing waits."""
        limit = blocks[:, None] if isinstance(blocks, torch.Tensor) else blocks
        self.built.clamp_(max=limit)

    def reorder(self, index: torch.Tensor) -> None:
        """Sequence `i` continues what sequence `index[i]` was; int64 `[S']`. Copies the table, as the cache copies its keys."""
        self.table, self.states, self.built = (x.index_select(0, index) for x in (self.table, self.states, self.built))

    def take(self, old: KeyPyramid) -> None:
        """Go on where a pyramid of smaller capacity was; rows keep their places."""
        self.table[:, :, : old.table.shape[2]] = old.table
        self.states[:, :, : old.states.shape[2]] = old.states
        self.built.copy_(old.built)

    def extend(self, kv: KeyValues, sequences: Sequences, block_q: int, append: bool) -> None:
        """Reach as far as the call's query blocks of `block_q` rows need. `append`: few keys are new (decode), so one launch
        does it all; otherwise tiles are built side by side."""
        config, blocks = self.config, sequences.max_keys // self.config.block_k
        block_table, stride_table = kv.table()
        arguments = (
            self.table, self.states, self.built, kv.k, block_table, sequences.table, self.table.stride(0), self.table.stride(1),
            self.states.stride(0), self.states.stride(1), *kv.strides(kv.k), stride_table, sequences.table.stride(0),
            config.window,
        )  # fmt: skip
        fixed = constants(config, self.dim, block_q, append) | dict(PAGE_SIZE=kv.page_size)
        lanes, count = self.built.shape[1], sequences.count
        if self.outliers:
            level = 0
            while not append and blocks >> level:
                outliers.level_kernel[(blocks >> level, self.heads, count)](*arguments, level, **fixed)
                level += 1
            outliers.append_outliers_kernel[(lanes, count)](*arguments, BUILD=append, **fixed)
            return
        weight = 1.0 if config.representative == "minmax" else config.method_options().weight
        if not append and blocks:
            summaries.tiles_kernel[(-(-blocks >> TILE_LEVELS), lanes, count)](*arguments, weight, **fixed)
        summaries.append_kernel[(lanes, count)](*arguments, weight, BUILD=append, **fixed)


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The kernels of the default representative and of outliers, in prefill and in decode."""
    from hip_hf.config import HiPConfig

    pointers = dict.fromkeys(("table", "k"), Pointer(dtype)) | dict.fromkeys(("states", "means"), Pointer(torch.float32))
    pointers |= dict.fromkeys(("built", "block_table", "sequences"), Pointer(torch.int32))
    strides = ("sequence", "head", "state_sequence", "state_head", "mean_sequence", "mean_head", "kb", "kh", "kt", "table")
    numbers = {f"stride_{name}": 1024 * dim for name in strides} | dict(stride_field=1, window=512, weight=0.5, level=3)
    found = []
    for representative, kernels in (
        ("blend", ((summaries.tiles_kernel, None), (summaries.append_kernel, True), (summaries.append_kernel, False))),
        ("outliers", ((outliers.level_kernel, None), (outliers.append_outliers_kernel, True))),
    ):
        for kernel, build in kernels:
            fixed = constants(HiPConfig(representative=representative), dim, 1 if build else 64, bool(build))
            flags = dict(PAGE_SIZE=256 if build else 0, **({} if build is None else dict(BUILD=build)))
            given = {**pointers, **numbers, **fixed, **flags}
            wanted = {name: given[name] for name in (*kernel.arg_names, "num_warps") if name in given}
            step = "tiles" if build is None else "append" if build else "merge"
            found.append(Launch(f"pyramid, {representative}, {step}", kernel, wanted))
    return found
