"""FLOPs and bytes of what the GPU kernels do, by formulas (`docs/performance.md`): of calls, and of each of their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import torch

from hip_hf.config import HiPConfig
from hip_hf.kernels.prefill import rows_of
from hip_hf.kernels.search import MOST_LOOKS
from hip_hf.kernels.tuning import MOST_SPLITS, Tile, tile_of
from hip_hf.kernels.voting import Voting
from hip_hf.methods import hyper

# Dense bf16 TFLOP/s with fp32 sums, and TB/s of device memory: the makers' data sheets.
GPUS = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.0), "RTX 4090": (165.2, 1.008)}
TARGETS = {"H200": "sm90", "H100": "sm90", "A100": "sm80", "RTX 4090": "sm89"}
# Rows of a query block where all keys are read (`kernels.prefill.dense_reads`).
DENSE_BLOCK = 64


@dataclass(frozen=True)
class Shape:
    """One attention layer: query and key heads, head dim, bytes of an element; `target`: whose launch configurations count."""

    query_heads: int = 32
    key_heads: int = 8
    dim: int = 128
    size: int = 2
    target: str = TARGETS["H200"]

    @property
    def row(self) -> int:
        """Bytes of a query row of all heads."""
        return self.query_heads * self.dim * self.size

    def lists(self, config: HiPConfig) -> int:
        """Selections of a query block."""
        return self.key_heads if config.group_shared else self.query_heads

    def tile(self, kernel: str) -> Tile:
        dtype = torch.float32 if self.size == torch.float32.itemsize else torch.bfloat16
        return tile_of(kernel, self.target, self.dim, self.dim, dtype)

    def row_tiles(self, kernel: str, block_q: int, lists: int) -> int:
        """Tiles into which `kernel` cuts the rows of a query block; each gathers its keys for itself."""
        return ceil(block_q / rows_of(self.tile(kernel), self.query_heads // lists, block_q))

    def gathered(self, kernel: str, block_q: int, lists: int, keys: float) -> float:
        """Bytes of K and V that the tiles of a query block read, `keys` of them each."""
        return self.row_tiles(kernel, block_q, lists) * lists * keys * 2 * self.dim * self.size


@dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products, and bytes from device memory if nothing that was read stays in a cache."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        return Cost(self.flops * count, self.bytes * count)

    def milliseconds(self, gpu: str) -> float:
        _, terabytes = GPUS[gpu]
        return max(self.products(gpu), 1e3 * self.bytes / (terabytes * 1e12))

    def products(self, gpu: str) -> float:
        """Milliseconds of the matrix products alone: what is left if every gather is served by a cache."""
        return 1e3 * self.flops / (GPUS[gpu][0] * 1e12)


NO_COST = Cost(0, 0)


def levels(tokens: int, config: HiPConfig) -> int:
    """Levels of the pyramid that a search over `tokens` keys scores."""
    start = 2 * config.beam_blocks * config.block_k
    return 1 + max(0, ceil(log2(tokens / start)))


def search(tokens: int, votes: int, walking: int, config: HiPConfig, shape: Shape) -> Cost:
    """One selection by so many votes, all of which fit into one tile, of which so many are `walking` the tree."""
    candidates = 2 * config.beam_blocks
    summaries = levels(tokens, config) * min(candidates, tokens // config.block_k)
    exact = min(config.rescore_blocks * config.block_k, tokens)
    flops = (walking * 4 * summaries + votes * 2 * exact) * shape.dim
    return Cost(flops, (2 * summaries + exact) * shape.dim * shape.size)


def near_keys(tokens: int, config: HiPConfig, block_q: int) -> int:
    """Keys that a query block reads in any case."""
    return min(config.sink + config.window + block_q, tokens)


def need(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Need of a prompt's rows: of those that are asked, q, and the keys that they read in any case with a sample of the rest, for
    what they find near and what stands out from it."""
    voting = voting_of(config, shape)
    if not (voting.weighed or voting.ranked):
        return Cost(0, 0)
    sample, share = config.method_options().sample if voting.ranked else 0, voting.asked / config.block_q
    keys = near_keys(tokens, config, config.block_q) + min(sample, tokens)
    tiles = tokens / config.block_q * shape.row_tiles("prefill", voting.asked, shape.key_heads)
    gather = tiles * shape.key_heads * keys * shape.dim * shape.size
    numbers = (2 if voting.ranked else 1) * share * shape.query_heads * torch.float32.itemsize
    return Cost(2 * tokens * share * shape.query_heads * keys * shape.dim, gather + tokens * (share * shape.row + numbers))


def vote(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """The rows of the greatest need, copied with what they find near: needs are read."""
    voting = voting_of(config, shape)
    if not voting.ranked:
        return Cost(0, 0)
    copied, share = 2 / config.query_stride, voting.asked / config.block_q
    numbers = (share + copied) * shape.query_heads * torch.float32.itemsize
    return Cost(0, tokens * (copied * shape.row + numbers))


def voting_of(config: HiPConfig, shape: Shape) -> Voting:
    return Voting.of(config, shape.query_heads // shape.key_heads, config.block_q, False)


def pyramid(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """K is read once, and summaries of twice its size are written for each `block_k` keys and, in all, for as many above them."""
    return Cost(0, tokens * shape.key_heads * shape.dim * shape.size * (1 + 4 / config.block_k))


def searches(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """The searches of a prompt's query blocks, which read the votes, and how much these find near."""
    voting = voting_of(config, shape)
    read = tokens / config.query_stride * (shape.row + shape.query_heads * torch.float32.itemsize * voting.weighed)
    found = search(tokens, voting.slots, voting.walkers, config, shape)
    return found.times(tokens / config.block_q * shape.lists(config)) + Cost(0, read)


def selection(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """All that a prompt does before its attention."""
    return sum((part(tokens, config, shape) for part in (pyramid, need, vote, searches)), NO_COST)


def step_need(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """What a decode step's rows find near, if votes are by need."""
    if config.vote == "sampled":
        return NO_COST
    keys = near_keys(tokens, config, 1)
    return Cost(2 * shape.query_heads * keys * shape.dim, shape.key_heads * keys * shape.dim * shape.size)


def step_search(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """A decode step's search."""
    heads = shape.query_heads // shape.lists(config)
    return search(tokens, heads, heads, config, shape).times(shape.lists(config))


def refresh_step(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """The selection of a decode step."""
    return step_need(tokens, config, shape) + step_search(tokens, config, shape)


def keys_read(tokens: int, config: HiPConfig) -> float:
    """Keys of a query block's tiles."""
    return min(config.sink + config.budget + config.window + config.block_q, tokens)


def tail(tokens: int, config: HiPConfig) -> int:
    """The last rows of a prompt, which read every key."""
    return min(config.dense_tail, tokens)


def by_rows(kernel: str, tokens: int, config: HiPConfig, shape: Shape, products: int, rows_moved: int) -> Cost:
    """A kernel that goes through the keys of each query block, sparse rows and dense tail: `products` of a row and a key,
    `rows_moved` times the bytes of all query rows."""
    keys, dense = keys_read(tokens, config), tail(tokens, config)
    pairs = (tokens - dense) * keys + dense * tokens
    gather = (tokens - dense) / config.block_q * shape.gathered(kernel, config.block_q, shape.lists(config), keys)
    gather += dense / DENSE_BLOCK * shape.gathered(kernel, DENSE_BLOCK, shape.key_heads, tokens)
    return Cost(2 * products * pairs * shape.query_heads * shape.dim, gather + rows_moved * tokens * shape.row)


def prefill(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Attention of a prompt, forward: two products; q and out."""
    return by_rows("prefill", tokens, config, shape, products=2, rows_moved=2)


def query_gradients(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Three products; q, dO, O and dQ."""
    return by_rows("backward queries", tokens, config, shape, products=3, rows_moved=4)


def key_gradients(tokens: int, config: HiPConfig, shape: Shape, shared: float = 2.0) -> Cost:
    """Four products, for dK and dV. `shared`: key blocks selected of each tile of keys that is touched."""
    per_tile, dense = max(1, shape.tile("backward keys").keys // config.block_k), tail(tokens, config)
    wide = keys_read(tokens, config) + min(config.budget, tokens) * (per_tile / shared - 1)  # rows meet whole tiles
    pairs = (tokens - dense) * wide + dense * tokens
    read = pairs / (per_tile * config.block_k) * shape.row * 2  # q and dO, once a tile
    return Cost(8 * pairs * shape.query_heads * shape.dim, read)


def backward(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """The two kernels of the gradients."""
    return query_gradients(tokens, config, shape) + key_gradients(tokens, config, shape)


def step_attention(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Attention of one decode step of one sequence."""
    keys = min(config.sink + config.budget + config.window, tokens)
    return Cost(4 * shape.query_heads * keys * shape.dim, shape.gathered("decode", 1, shape.lists(config), keys))


def decode(tokens: int, config: HiPConfig, shape: Shape, refresh: int) -> Cost:
    """One step of one sequence, a selection serving `refresh` steps."""
    return step_attention(tokens, config, shape) + refresh_step(tokens, config, shape).times(1 / refresh)


def dense_prefill(tokens: int, shape: Shape) -> Cost:
    row = (2 * shape.query_heads + 2 * shape.key_heads) * shape.dim * shape.size
    return Cost(2 * tokens * tokens * shape.query_heads * shape.dim, tokens * row)


def dense_decode(tokens: int, shape: Shape) -> Cost:
    return Cost(4 * shape.query_heads * tokens * shape.dim, shape.key_heads * tokens * 2 * shape.dim * shape.size)


def prompt_once(tokens: int, shape: Shape, queries: int, keys: int) -> Cost:
    """Bytes of as many tensors like q and like K of a prompt, each moved once."""
    return Cost(0, tokens * (queries * shape.query_heads + keys * shape.key_heads) * shape.dim * shape.size)


def combination(shape: Shape) -> Cost:
    """Parts of a decode step's rows, fp32, merged: as many as there can be."""
    return Cost(0, MOST_SPLITS * shape.query_heads * (shape.dim + 1) * torch.float32.itemsize + shape.row)


def appended(config: HiPConfig, shape: Shape) -> Cost:
    """A token's share of the summaries: each block's keys are read once, and its summary and a parent's are written."""
    return pyramid(1, config, shape)


def choice(config: HiPConfig, shape: Shape) -> Cost:
    """What the programs that share a search have found in the keys of each block, fp32, read again."""
    return Cost(0, MOST_LOOKS * shape.query_heads * config.rescore_blocks * torch.float32.itemsize)


def hashing(tokens: int, options: hyper.Options, shape: Shape) -> Cost:
    """HyperAttention's hashes of queries and keys."""
    flops, _, _ = hyper.flops(options, 0, tokens, shape.dim, shape.dim)
    return Cost(flops * shape.query_heads, prompt_once(tokens, shape, 1, 1).bytes)


def leaves(tokens: int, options: hyper.Options, shape: Shape) -> Cost:
    """HyperAttention's exact parts: short prompts, side by side."""
    pairs = sum((leaf.end - leaf.first) ** 2 / 2 for leaf in hyper.split(0, tokens, options.min_seq_len)[0])
    gather = pairs / DENSE_BLOCK * shape.gathered("prefill", DENSE_BLOCK, shape.key_heads, 1)
    return Cost(4 * pairs * shape.query_heads * shape.dim, gather + 2 * tokens * shape.row)


def squares(tokens: int, options: hyper.Options, shape: Shape) -> Cost:
    """HyperAttention's squares: each block of rows with its own block of keys and a sample. Rows go on from what they have."""
    _, attention, _ = hyper.flops(options, 0, tokens, shape.dim, shape.dim)
    flops = attention * shape.query_heads - leaves(tokens, options, shape).flops
    pairs = flops / (4 * shape.dim)
    rows = pairs / (options.block_size + options.sample_size)
    gather = pairs / shape.tile("hyper squares").rows * 2 * shape.dim * shape.size
    return Cost(flops, gather + rows * shape.dim * (shape.size + 2 * torch.float32.itemsize))


def anchors(tokens: int, gamma: int, shape: Shape) -> Cost:
    """Delta correction's dense rows, one in `gamma`."""
    pairs = tokens * tokens / (2 * gamma)
    each = rows_of(shape.tile("prefill"), shape.query_heads // shape.key_heads, DENSE_BLOCK)
    gather = pairs / each * shape.key_heads * 2 * shape.dim * shape.size
    return Cost(4 * pairs * shape.query_heads * shape.dim, gather + 2 * tokens / gamma * shape.row)


def spreading(tokens: int, shape: Shape) -> Cost:
    """The differences of Delta's anchors, brought to their rows: output and log-sum-exp read and written."""
    return Cost(0, 2 * tokens * (shape.row + shape.query_heads * torch.float32.itemsize))
