"""FLOPs and bytes of what the GPU kernels do, by formulas (`docs/performance.md`): of calls, and of
each of their kernels.

Where query blocks differ, each is counted as if it were the prompt's last one, which has most to
do.
"""

from __future__ import annotations

from math import ceil, log2
from typing import Any

import torch

from hip_hf.backends.triton.common.arguments import dense_reads
from hip_hf.backends.triton.pyramid import TILE_LEVELS, vectors_per_summary
from hip_hf.backends.triton.selection.search import looks_for, search_constants
from hip_hf.backends.triton.selection.voting import Voting
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.gpu_shapes import FP32_BYTES, NO_COST, KernelCost, Shape
from hip_hf.eval.measure.latency import refresh_period
from hip_hf.methods.hip import looked_at_whole
from hip_hf.methods.need import most_sampled

# Rows of a query block where all keys are read.
DENSE_BLOCK = dense_reads().block_q


def launch(tokens: int, config: HiPConfig, shape: Shape, block_q: int) -> dict[str, Any]:
    """Compile-time arguments of the search that is launched for a prompt or, with `block_q` 1, for
    a decode step."""
    step = block_q == 1
    looks = looks_for(shape.sequences * shape.lists(config), config.block_k, shape.processors)
    call = (config, shape.group, shape.dim, shape.dtype, block_q, tokens, shape.target)
    return search_constants(*call, stateful=step, looks=looks)  # those of a prompt share nothing


def search(tokens: int, config: HiPConfig, shape: Shape, block_q: int) -> KernelCost:
    """One selection. Every tile of votes, of which the first walk the tree, reads what it scores
    anew; programs that share a search read a part of the keys each, and the summaries all of them.
    Few candidates are looked at whole."""
    fixed, whole = launch(tokens, config, shape, block_q), searched_whole(tokens, config)
    walkers, looks = fixed["WALKERS"], fixed["LOOKS"]
    if whole:
        summaries, exact = 0, whole
        votes, tiles = fixed["VOTES_WHOLE"], fixed["TILES_WHOLE"]
    else:
        # levels of the pyramid that are scored
        levels = 1 + max(0, ceil(log2(tokens / (config.start_blocks * config.block_k))))
        summaries = looks * fixed["PARTS"] * levels * min(fixed["MOST"], tokens // config.block_k)
        exact = min(fixed["LAST"] * config.block_k, tokens) if fixed["RESCORE"] else 0
        votes, tiles = fixed["VOTES"], fixed["TILES"]
    gathered = ceil(walkers / fixed["BLOCK_M"]) * summaries + tiles * exact
    flops = 2 * (walkers * summaries + votes * exact) * shape.dim
    return KernelCost(flops, gathered * shape.dim * shape.size + found(fixed, whole))


def searched_whole(tokens: int, config: HiPConfig) -> int:
    """Keys of the candidates where all are looked at; 0 if they are walked through."""
    low = config.sink_end // config.block_k
    high = max(low, (tokens - config.window) // config.block_k)
    return (high - low) * config.block_k if looked_at_whole(config, low, high) else 0


def found(fixed: dict[str, Any], whole: int) -> int:
    """Bytes that the programs which share a search leave for the one that chooses: blocks, unless
    these are the candidates as a `whole`, and what is in their keys."""
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
    voting = voting_of(config, shape)
    if not (voting.weighed or voting.ranked):
        return NO_COST
    share = voting.asked / config.block_q
    keys = keys_near(tokens, config, config.block_q)
    if voting_share(tokens, config, shape) < share:
        keys += most_sampled(config, 0, tokens // config.block_k)
    tiles = tokens / config.block_q * shape.row_tiles("prefill", voting.asked, shape.key_heads)
    numbers = shape.number_bytes((2 if voting.ranked else 1) * share)
    moved = shape.key_bytes(tiles * keys) + tokens * (share * shape.row + numbers)
    return KernelCost(shape.product_flops(tokens * share * keys), moved)


def voting_of(config: HiPConfig, shape: Shape) -> Voting:
    """Who votes in a prompt's query block."""
    return Voting.of(config, shape.group, config.block_q, False)


def voting_share(tokens: int, config: HiPConfig, shape: Shape) -> float:
    """The share of query rows that vote."""
    voting = voting_of(config, shape)
    votes = voting.votes_whole if searched_whole(tokens, config) else voting.votes
    return votes / (voting.members * config.block_q)


def vote(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """The rows of the greatest need, copied with what they find near: needs are read."""
    voting = voting_of(config, shape)
    if not voting.ranked:
        return NO_COST
    copied, share = 2 * voting_share(tokens, config, shape), voting.asked / config.block_q
    numbers = shape.number_bytes(share + copied * voting.weighed)
    return KernelCost(0, tokens * (copied * shape.row + numbers))


def summaries(
    blocks: float, keys: float, chunks: float, states: float, config: HiPConfig, shape: Shape
) -> KernelCost:
    """Return the cost of the summaries of `blocks` key blocks. For each of them `keys` are read,
    summaries of `chunks` are written, and `states` of them are moved, in fp32."""
    parts = vectors_per_summary(config)
    of_head = (keys + chunks * parts) * shape.size + states * (parts + 1) * FP32_BYTES
    return KernelCost(0, blocks * shape.key_heads * shape.dim * of_head)


def pyramid(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """K is read once; a tile of blocks becomes a tree of chunks, and the state of its root is
    kept."""
    tile, blocks = 1 << TILE_LEVELS, tokens / config.block_k
    return summaries(blocks, config.block_k, (2 * tile - 1) / tile, 1 / tile, config, shape)


def merges(blocks: float, config: HiPConfig, shape: Shape) -> KernelCost:
    """Return the cost of what lies above the tiles of `blocks` key blocks, in all one chunk for
    each tile: two states are read, one is written."""
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
    vote_bytes = shape.row + shape.number_bytes(voting_of(config, shape).weighed)
    read = tokens * voting_share(tokens, config, shape) * vote_bytes
    count = tokens / config.block_q * shape.lists(config)
    return search(tokens, config, shape, config.block_q).times(count) + KernelCost(0, read)


def keys_of_tiles(tokens: int, config: HiPConfig) -> float:
    """Keys of a query block's tiles."""
    return min(config.sink + config.budget + config.window + config.block_q, tokens)


def tail(tokens: int, config: HiPConfig) -> int:
    """The last rows of a prompt, which read every key."""
    return min(config.dense_tail, tokens)


def dense_keys(kernel: str, tokens: int, rows: int, shape: Shape, products: int) -> KernelCost:
    """What `kernel` does with the keys of the last `rows`, all of them: `products` of a row and a
    key, and the gathers."""
    tiles = ceil(rows / shape.rows(kernel, DENSE_BLOCK, shape.key_heads))
    return KernelCost(
        shape.product_flops(products * rows * tokens), shape.key_bytes(2 * tiles * tokens)
    )


def by_rows(kernel: str, tokens: int, config: HiPConfig, shape: Shape, products: int) -> KernelCost:
    """A kernel that goes through the keys of each query block, sparse rows and dense tail, but for
    the rows themselves."""
    keys, dense = keys_of_tiles(tokens, config), tail(tokens, config)
    sparse, lists = tokens - dense, shape.lists(config)
    gather = sparse / config.block_q * shape.gathered(kernel, config.block_q, lists, keys)
    own = KernelCost(shape.product_flops(products * sparse * keys), gather)
    return own + dense_keys(kernel, tokens, dense, shape, products)


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
    merged = combination(tail(tokens, config), tail_splits(tokens, config, shape), shape)
    attention = {
        "attend_kernel": prompt_attention(tokens, config, shape),
        "combine_kernel": merged,
    }
    return selection_kernels(tokens, config, shape) | attention


def call_total(kernels: dict[str, KernelCost]) -> KernelCost:
    """A call of these kernels."""
    return sum(kernels.values(), NO_COST)


def query_gradients(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """Three products; q, dO, O and dQ."""
    rows = KernelCost(0, 4 * tokens * shape.row)
    return by_rows("backward queries", tokens, config, shape, products=3) + rows


def key_gradients(tokens: int, config: HiPConfig, shape: Shape, shared: float = 2.0) -> KernelCost:
    """Four products, for dK and dV. `shared`: key blocks selected of each tile of keys that is
    touched."""
    per_tile = max(1, shape.tile("backward keys").keys // config.block_k)
    dense, selected = tail(tokens, config), min(config.budget, tokens)
    # rows meet whole tiles
    wide = keys_of_tiles(tokens, config) + selected * (per_tile / shared - 1)
    pairs = (tokens - dense) * wide + dense * tokens
    read = pairs / (per_tile * config.block_k) * shape.row * 2  # q and dO, once a tile
    return KernelCost(shape.product_flops(4 * pairs), read)


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
    read = shape.key_bytes(shape.row_tiles("decode", 1, shape.key_heads) * keys)
    return KernelCost(shape.product_flops(keys), read + shape.row + shape.number_bytes(1))


def step_search(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """A decode step's searches: of each list's, every program that shares it reads the votes."""
    votes = KernelCost(0, launch(tokens, config, shape, 1)["LOOKS"] * shape.row)
    return search(tokens, config, shape, 1).times(shape.lists(config)) + votes


def choice(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """What the programs that share a search have found in the keys of each block, read again."""
    left = found(launch(tokens, config, shape, 1), searched_whole(tokens, config))
    return KernelCost(0, shape.lists(config) * left)


def step_splits(config: HiPConfig, shape: Shape) -> int:
    """Programs that share the keys of a decode step's row: scratch is made for a row just before a
    new selection."""
    return shape.splits(config.sparse_reach + refresh_period(config))


def step_attention(tokens: int, config: HiPConfig, shape: Shape) -> KernelCost:
    """Attention of one decode step of one sequence."""
    keys, lists = min(config.sink + config.budget + config.window, tokens), shape.lists(config)
    rows = shape.rows_moved(1, step_splits(config, shape))
    return KernelCost(
        shape.product_flops(2 * keys), shape.gathered("decode", 1, lists, keys) + rows
    )


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
    shares = {name: cost.times(1 / refresh) for name, cost in once.items()}
    shares["append_kernel"] = once["append_kernel"]
    attend, combine = step_attention(tokens, config, shape), combination(1, splits, shape)
    return shares | {"attend_kernel": attend, "combine_kernel": combine}


def dense_prefill(tokens: int, shape: Shape) -> KernelCost:
    """Dense attention of a prompt, whose tensors are moved once: half of all pairs, two products
    each."""
    moved = tokens * 2 * shape.row + shape.key_bytes(2 * tokens)
    return KernelCost(shape.product_flops(tokens * tokens), moved)


def dense_gradients(tokens: int, shape: Shape) -> KernelCost:
    """Five products, where the forward pass has two."""
    return dense_prefill(tokens, shape).times(5 / 2)


def dense_decode(tokens: int, shape: Shape) -> KernelCost:
    """Dense attention of a decode step."""
    return KernelCost(shape.product_flops(2 * tokens), shape.key_bytes(2 * tokens))
