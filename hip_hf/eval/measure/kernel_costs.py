"""FLOPs and bytes of what the GPU kernels do, by formulas (`docs/performance.md`): of calls, and of
each of their kernels.

Where query blocks differ, each is counted as if it were the prompt's last one, which has most to
do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch

from hip_hf.backends.triton.attention.decode import kernel_of, splits_of
from hip_hf.backends.triton.common.arguments import dense_reads, rows_of
from hip_hf.backends.triton.common.tuning import Tile, tile_of
from hip_hf.backends.triton.pyramid.pyramid import TILE_LEVELS, parts_of
from hip_hf.backends.triton.selection.search import constants, looks_for
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.latency import refresh_period
from hip_hf.geometry import mask_heads
from hip_hf.methods.hip import looked_at_whole

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
# Rows of a query block where all keys are read.
DENSE_BLOCK = dense_reads().block_q
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
        return torch.float32 if self.size == torch.float32.itemsize else torch.bfloat16

    def lists(self, config: HiPConfig) -> int:
        """Selections of a query block."""
        return mask_heads(config, self.query_heads, self.key_heads)

    def tile(self, kernel: str) -> Tile:
        return tile_of(kernel, self.target, self.dim, self.dim, self.dtype)

    def rows(self, kernel: str, block_q: int, lists: int) -> int:
        """Rows of a query block that a program of `kernel` takes."""
        return rows_of(self.tile(kernel), self.query_heads // lists, block_q)

    def row_tiles(self, kernel: str, block_q: int, lists: int) -> int:
        """Tiles into which `kernel` cuts the rows of a query block; each gathers its keys for
        itself."""
        return ceil(block_q / self.rows(kernel, block_q, lists))

    def gathered(self, kernel: str, block_q: int, lists: int, keys: float) -> float:
        """Bytes of K and V that the tiles of a query block read, `keys` of them each."""
        return self.row_tiles(kernel, block_q, lists) * lists * keys * 2 * self.dim * self.size

    def splits(self, keys: int, rows: int = 1, block_q: int = 1) -> int:
        """Programs that share the `keys` of a tile of so many rows of each sequence
        (`kernels.decode.splits_for`)."""
        tile, heads = self.tile(kernel_of(block_q)), self.sequences * self.key_heads
        return splits_of(tile, self.group, heads, keys, rows, block_q, self.processors)

    def rows_moved(self, rows: float, splits: int) -> float:
        """Bytes of query rows whose keys so many programs share: q, which each reads, and the
        output or each one's part of it."""
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
        return KernelCost(self.flops * count, self.bytes * count)

    def milliseconds(self, gpu: str) -> float:
        _, terabytes = GPUS[gpu]
        return max(self.products(gpu), 1e3 * self.bytes / (terabytes * 1e12))

    def products(self, gpu: str) -> float:
        """Milliseconds of the matrix products alone: what is left if every gather is served by a
        cache."""
        return 1e3 * self.flops / (GPUS[gpu][0] * 1e12)


NO_COST = KernelCost(0, 0)


def launch(tokens: int, config: HiPConfig, shape: Shape, block_q: int) -> dict[str, Any]:
    """Compile-time arguments of the search that is launched for a prompt or, with `block_q` 1, for
    a decode step."""
    step = block_q == 1
    looks = looks_for(shape.sequences * shape.lists(config), config.block_k, shape.processors)
    call = (config, shape.group, shape.dim, shape.dtype, block_q, tokens, shape.target)
    return constants(*call, stateful=step, looks=looks)  # those of a prompt share nothing


def search(tokens: int, config: HiPConfig, shape: Shape, block_q: int) -> KernelCost:
    """One selection. Every tile of votes, of which the first walk the tree, reads what it scores
    anew; programs that share a search read a part of the keys each, and the summaries all of them.
    A short middle is looked at whole."""
    fixed = launch(tokens, config, shape, block_q)
    whole, walkers, looks = whole_middle(tokens, config), fixed["WALKERS"], fixed["LOOKS"]
    votes = fixed["VOTES_WHOLE" if whole else "VOTES"]
    if whole:
        summaries, exact, tiles = 0, whole, fixed["TILES_WHOLE"]
    else:
        # levels of the pyramid that are scored
        levels = 1 + max(0, ceil(log2(tokens / (config.start_blocks * config.block_k))))
        summaries = looks * fixed["PARTS"] * levels * min(fixed["MOST"], tokens // config.block_k)
        exact, tiles = (
            min(fixed["LAST"] * config.block_k, tokens) if fixed["RESCORE"] else 0,
            fixed["TILES"],
        )
    gathered = ceil(walkers / fixed["BLOCK_M"]) * summaries + tiles * exact
    return KernelCost(
        2 * (walkers * summaries + votes * exact) * shape.dim,
        gathered * shape.dim * shape.size + found(fixed, whole),
    )


def whole_middle(tokens: int, config: HiPConfig) -> int:
    """Keys of a middle that is looked at whole; 0 if it is walked through."""
    low = -(-config.sink // config.block_k)
    high = max(low, (tokens - config.window) // config.block_k)
    return (high - low) * config.block_k if looked_at_whole(config, low, high) else 0


def found(fixed: dict[str, Any], whole: int) -> int:
    """Bytes that the programs which share a search leave for the one that chooses: blocks, unless
    that is the `whole` middle, and what is in their keys."""
    if fixed["LOOKS"] == 1:
        return 0
    listed = 0 if whole else fixed["KEPT_LAST"] * torch.int32.itemsize
    names = ("M", "TILES_WHOLE", "NARROW_WHOLE") if whole else ("KEPT_LAST", "TILES", "NARROW")
    blocks, tiles, narrow = (fixed[name] for name in names)
    return listed + fixed["LOOKS"] * tiles * (blocks + 1) * narrow * FP32_BYTES


def keys_near(tokens: int, config: HiPConfig, block_q: int) -> int:
    """Keys that a query block reads in any case."""
    return min(config.sink + config.window + block_q, tokens)


def need(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """Need of a prompt's rows: of those that are asked, q, and the keys that they read in any case
    with a sample of the rest, for what they find near and what stands out from it."""
    voting = Voting.of(config, shape.group, config.block_q, False)
    if not (voting.weighed or voting.ranked):
        return NO_COST
    share = voting.asked / config.block_q
    sample = config.method_options().sample if voting_share(tokens, config, shape) < share else 0
    keys = keys_near(tokens, config, config.block_q) + min(sample, tokens)
    tiles = tokens / config.block_q * shape.row_tiles("prefill", voting.asked, shape.key_heads)
    gather = tiles * shape.key_heads * keys * shape.dim * shape.size
    numbers = (2 if voting.ranked else 1) * share * shape.query_heads * FP32_BYTES
    return KernelCost(
        2 * tokens * share * shape.query_heads * keys * shape.dim,
        gather + tokens * (share * shape.row + numbers),
    )


def voting_share(tokens: int, config: HiPConfig, shape: Shape) -> float:
    """The share of query rows that vote."""
    voting = Voting.of(config, shape.group, config.block_q, False)
    votes = voting.votes_whole if whole_middle(tokens, config) else voting.votes
    return votes / (voting.voters * config.block_q)


def vote(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """The rows of the greatest need, copied with what they find near: needs are read."""
    voting = Voting.of(config, shape.group, config.block_q, False)
    if not voting.ranked:
        return NO_COST
    copied, share = 2 * voting_share(tokens, config, shape), voting.asked / config.block_q
    numbers = (share + copied * voting.weighed) * shape.query_heads * FP32_BYTES
    return KernelCost(0, tokens * (copied * shape.row + numbers))


def summaries(
    blocks: float, keys: float, chunks: float, states: float, config: HiPConfig, shape: Shape
) -> KernelCost:
    """For so many key blocks, of each: `keys` read, summaries of `chunks` written, and `states` of
    them moved, in fp32."""
    parts = parts_of(config)
    of_head = (keys + chunks * parts) * shape.size + states * (parts + 1) * FP32_BYTES
    return KernelCost(0, blocks * shape.key_heads * shape.dim * of_head)


def pyramid(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """K is read once; a tile of blocks becomes a tree of chunks, and the state of its root is
    kept."""
    tile = 1 << TILE_LEVELS
    return summaries(
        tokens / config.block_k, config.block_k, (2 * tile - 1) / tile, 1 / tile, config, shape
    )


def merges(blocks: float, config: HiPConfig, shape: Shape) -> KernelCost:
    """What lies above the tiles of so many blocks, of each tile one chunk in all: two states are
    read, one is written."""
    return summaries(blocks / (1 << TILE_LEVELS), 0, 1, 3, config, shape)


def appended(config: HiPConfig, shape: Shape) -> KernelCost:
    """A token's share of the summaries. Each block that becomes complete has its tile, as far as it
    goes, read and written anew: with `n` blocks these are `n + n // 2 + n // 4 + ...` chunks."""
    tile = 1 << TILE_LEVELS
    chunks = sum(n >> level for n in range(1, tile + 1) for level in range(TILE_LEVELS + 1)) / tile
    keys = (tile + 1) / 2 * config.block_k
    one = summaries(1, keys, chunks, 1 / tile, config, shape) + merges(1, config, shape)
    return one.times(1 / config.block_k)


def searches(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """The searches of a prompt's query blocks, which read the votes, and how much these find
    near."""
    weighed = Voting.of(config, shape.group, config.block_q, False).weighed
    read = (
        tokens
        * voting_share(tokens, config, shape)
        * (shape.row + shape.query_heads * FP32_BYTES * weighed)
    )
    count = tokens / config.block_q * shape.lists(config)
    return search(tokens, config, shape, config.block_q).times(count) + KernelCost(0, read)


def keys_read(tokens: int, config: HiPConfig) -> float:
    """Keys of a query block's tiles."""
    return min(config.sink + config.budget + config.window + config.block_q, tokens)


def tail(tokens: int, config: HiPConfig) -> int:
    """The last rows of a prompt, which read every key."""
    return min(config.dense_tail, tokens)


def dense_keys(kernel: str, tokens: int, rows: int, shape: Shape, products: int) -> KernelCost:
    """What `kernel` does with the keys of the last `rows`, all of them: `products` of a row and a
    key, and the gathers."""
    tiles = ceil(rows / shape.rows(kernel, DENSE_BLOCK, shape.key_heads))
    gather = tiles * shape.key_heads * tokens * 2 * shape.dim * shape.size
    return KernelCost(2 * products * rows * tokens * shape.query_heads * shape.dim, gather)


def by_rows(kernel: str, tokens: int, config: HiPConfig, shape: Shape, products: int) -> KernelCost:
    """A kernel that goes through the keys of each query block, sparse rows and dense tail, but for
    the rows themselves."""
    keys, dense = keys_read(tokens, config), tail(tokens, config)
    sparse = tokens - dense
    gather = (
        sparse / config.block_q * shape.gathered(kernel, config.block_q, shape.lists(config), keys)
    )
    flops = 2 * products * sparse * keys * shape.query_heads * shape.dim
    return KernelCost(flops, gather) + dense_keys(kernel, tokens, dense, shape, products)


def tail_splits(tokens: int, config: HiPConfig, shape: Shape) -> int:
    """Programs that share the keys of a tile of the dense tail."""
    rows = tail(tokens, config)
    return shape.splits(tokens, rows, DENSE_BLOCK) if rows else 1


def prompt_attention(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """Attention of a prompt, forward: two products; q and out."""
    dense, splits = tail(tokens, config), tail_splits(tokens, config, shape)
    moved = shape.rows_moved(tokens - dense, 1) + shape.rows_moved(dense, splits)
    return by_rows("prefill", tokens, config, shape, products=2) + KernelCost(0, moved)


def combination(rows: int, splits: int, shape: Shape) -> KernelCost:
    """Partial results of rows, merged, where there are any."""
    return KernelCost(0, rows * (splits * shape.result + shape.row)) if splits > 1 else NO_COST


def selection_kernels(tokens: int, config: HiPConfig, shape: Shape) -> dict[str, KernelCost]:
    """All that a prompt does before its attention, by kernel."""
    return {
        "tiles_kernel": pyramid(tokens, config, shape),
        "append_kernel": merges(tokens / config.block_k, config, shape),
        "need_kernel": need(tokens, config, shape),
        "vote_kernel": vote(tokens, config, shape),
        "select_kernel": searches(tokens, config, shape),
    }


def prompt_kernels(tokens: int, config: HiPConfig, shape: Shape) -> dict[str, KernelCost]:
    """All that a prompt does, by kernel."""
    return selection_kernels(tokens, config, shape) | {
        "attend_kernel": prompt_attention(tokens, config, shape),
        "combine_kernel": combination(
            tail(tokens, config), tail_splits(tokens, config, shape), shape
        ),
    }


def call_total(kernels: dict[str, KernelCost]) -> KernelCost:
    """A call of these kernels."""
    return sum(kernels.values(), NO_COST)


def query_gradients(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """Three products; q, dO, O and dQ."""
    return by_rows("backward queries", tokens, config, shape, products=3) + KernelCost(
        0, 4 * tokens * shape.row
    )


def key_gradients(tokens: int, config: HiPConfig, shape: Shape, shared: float = 2.0) -> KernelCost:
    """Four products, for dK and dV. `shared`: key blocks selected of each tile of keys that is
    touched."""
    per_tile, dense = (
        max(1, shape.tile("backward keys").keys // config.block_k),
        tail(tokens, config),
    )
    wide = keys_read(tokens, config) + min(config.budget, tokens) * (
        per_tile / shared - 1
    )  # rows meet whole tiles
    pairs = (tokens - dense) * wide + dense * tokens
    read = pairs / (per_tile * config.block_k) * shape.row * 2  # q and dO, once a tile
    return KernelCost(8 * pairs * shape.query_heads * shape.dim, read)


def gradient_kernels(tokens: int, config: HiPConfig, shape: Shape) -> dict[str, KernelCost]:
    """The two kernels of the gradients."""
    queries, keys = query_gradients(tokens, config, shape), key_gradients(tokens, config, shape)
    return {"query_gradient_kernel": queries, "key_gradient_kernel": keys}


def step_need(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """What a decode step's row finds near, if votes are weighed by it: q, keys, and a number of
    each head."""
    if not Voting.of(config, shape.group, 1, False).weighed:
        return NO_COST
    keys = keys_near(tokens, config, 1)
    read = (
        shape.row_tiles("decode", 1, shape.key_heads)
        * shape.key_heads
        * keys
        * shape.dim
        * shape.size
    )
    return KernelCost(
        2 * shape.query_heads * keys * shape.dim, read + shape.row + shape.query_heads * FP32_BYTES
    )


def step_search(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """A decode step's searches: of each list's, every program that shares it reads the votes."""
    looks = launch(tokens, config, shape, 1)["LOOKS"]
    return search(tokens, config, shape, 1).times(shape.lists(config)) + KernelCost(
        0, looks * shape.row
    )


def choice(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """What the programs that share a search have found in the keys of each block, read again."""
    return KernelCost(
        0,
        shape.lists(config) * found(launch(tokens, config, shape, 1), whole_middle(tokens, config)),
    )


def step_splits(config: HiPConfig, shape: Shape) -> int:
    """Programs that share the keys of a decode step's row: scratch is made for a row just before a
    new selection."""
    return shape.splits(config.sparse_reach + refresh_period(config))


def step_attention(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """Attention of one decode step of one sequence."""
    keys, lists = min(config.sink + config.budget + config.window, tokens), shape.lists(config)
    moved = shape.gathered("decode", 1, lists, keys) + shape.rows_moved(
        1, step_splits(config, shape)
    )
    return KernelCost(4 * shape.query_heads * keys * shape.dim, moved)


def refresh_kernels(tokens: int, config: HiPConfig, shape: Shape) -> dict[str, KernelCost]:
    """The selection of a decode step, by kernel; of the summaries a token's share."""
    return {
        "append_kernel": appended(config, shape),
        "need_kernel": step_need(tokens, config, shape),
        "select_kernel": step_search(tokens, config, shape),
        "choose_kernel": choice(tokens, config, shape),
    }


def step_kernels(
    tokens: int, config: HiPConfig, shape: Shape, refresh: int
) -> dict[str, KernelCost]:
    """One step of one sequence, by kernel, a selection serving `refresh` steps; keys are summarised
    in any case."""
    once, splits = refresh_kernels(tokens, config, shape), step_splits(config, shape)
    shares = {
        name: cost.times(1 if name == "append_kernel" else 1 / refresh)
        for name, cost in once.items()
    }
    attend, combine = step_attention(tokens, config, shape), combination(1, splits, shape)
    return shares | {"attend_kernel": attend, "combine_kernel": combine}


def dense_prefill(tokens: int, shape: Shape) -> KernelCost:
    row = (2 * shape.query_heads + 2 * shape.key_heads) * shape.dim * shape.size
    return KernelCost(2 * tokens * tokens * shape.query_heads * shape.dim, tokens * row)


def dense_gradients(tokens: int, shape: Shape) -> KernelCost:
    """Five products, where the forward pass has two."""
    return dense_prefill(tokens, shape).times(5 / 2)


def dense_decode(tokens: int, shape: Shape) -> KernelCost:
    return KernelCost(
        4 * shape.query_heads * tokens * shape.dim,
        shape.key_heads * tokens * 2 * shape.dim * shape.size,
    )
