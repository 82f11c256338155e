"""HyperAttention (arXiv 2310.05869): dense attention estimated in near-linear time, by hashing and
by sampling.

Causal attention is split. Short stretches (`min_seq_len`) are computed exactly; of a longer one the
two halves are split further, and the square between them, the second half's queries against the
first half's keys, is estimated:

    keys ->   exact
              square  exact
              square  square  exact
              square  square  square  exact     (an 8th; squares of one size touch each row once)

    square = own block (keys that hash alike, exact) + a sample of the others

Queries and keys of a square are sorted by an angular hash whose neighbouring buckets are neighbours
in space; each block of queries attends exactly to the block of keys at the same place in the order,
its *own block*, and to `sample_size` keys drawn uniformly from the square, each of which counts for
`keys / sample_size` keys unless it is in the own block, where it has been counted already. The
softmax's denominator is thus estimated without bias.

This is an `Attention`: it selects no key blocks, it computes output and log-sum-exp itself. Decode
is dense over the cache. The paper's quality figures hold when only some layers are replaced
(`HiPConfig.layers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.config import HiPConfig, refuse
from hip_hf.methods import base

if TYPE_CHECKING:
    from hip_hf.problem import AttentionProblem

# Bits of the hash at most; rows of a query block at least.
MOST_BITS, FEWEST_ROWS = 30, 16


@dataclass(frozen=True)
class Options:
    """`lsh_num_projs`: bits of the hash. `block_size`: keys of the own block. `sample_size`: keys
    sampled; 0 leaves the rest of a square out. `min_seq_len`: attention is exact up to this many
    keys. The defaults are the paper's."""

    lsh_num_projs: int = 7
    block_size: int = 256
    sample_size: int = 256
    min_seq_len: int = 4096

    def __post_init__(self) -> None:
        least = dict(lsh_num_projs=1, block_size=1, sample_size=0, min_seq_len=1)
        for name, low in least.items():
            value, high = getattr(self, name), MOST_BITS if name == "lsh_num_projs" else None
            if type(value) is not int or value < low or (high and value > high):
                allowed = f"an integer >= {low}" if high is None else f"{low} to {high}"
                refuse(f"options[{name!r}]", value, allowed)


def dense_reason(problem: AttentionProblem, config: HiPConfig, decoding: bool) -> tuple[str, bool]:
    """Why a call goes dense, and whether for want of support; an empty string if it does not."""
    if problem.sliding_window is not None and problem.sliding_window < problem.longest:
        return f"hyper has no sliding window ({problem.sliding_window})", True
    if decoding:
        return "hyper decodes densely over the cache", False
    exact = base.options_of(config, Options).min_seq_len
    if config.dense_below != 0 and problem.longest <= exact:
        return f"hyper is exact up to min_seq_len={exact}", False
    return "", False


@dataclass(frozen=True)
class Leaf:
    """Rows at positions `first` to `end - 1`, exact over the keys from `start` to each of them."""

    first: int
    end: int
    start: int


@dataclass(frozen=True)
class Square:
    """Rows at positions `first` to `end - 1` against all the keys `key_first` to `key_end - 1`,
    which come before them."""

    first: int
    end: int
    key_first: int
    key_end: int

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.end - self.first

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.key_end - self.key_first


def split(first: int, end: int, longest: int) -> tuple[list[Leaf], list[list[Square]]]:
    """Causal attention of the rows `first` to `end - 1` over the keys from 0 on, taken apart: every
    pair of a row and a key in its sight is in one leaf or one square. Squares of one list share no
    row."""
    if end <= longest:
        return [Leaf(first, end, 0)], []
    leaves: list[Leaf] = []
    levels: list[list[Square]] = [[Square(first, end, 0, first)]] if first else []

    def halve(low: int, high: int, level: int) -> None:
        if high - low <= longest:
            leaves.append(Leaf(low, high, low))
            return
        half = (low + high) // 2
        while len(levels) <= level:
            levels.append([])
        levels[level].append(Square(half, high, low, half))
        halve(low, half, level + 1)
        halve(half, high, level + 1)

    halve(first, end, len(levels))
    return leaves, levels


@dataclass(frozen=True)
class Tiling:
    """How the sorted rows and keys of a square meet: query block `i` holds the rows of rank
    `i * rows` on (the last may be short), its own block the `size` keys from rank `starts[i]` on.
    Blocks may overlap in keys, never in rows."""

    rows: int
    size: int
    samples: int
    starts: Tensor  # int64, one for each query block


def tile_square(square: Square, options: Options, device: torch.device) -> Tiling:
    """Own blocks lie at the same relative place in the keys' order as their rows in the rows'
    order."""
    size = min(options.block_size, square.keys)
    # where there are fewer rows than keys, shorter blocks of rows, so that their hashes stay as
    # close together
    alike = max(-(-options.block_size * square.rows // square.keys), FEWEST_ROWS)
    rows = min(alike, options.block_size, square.rows)
    blocks = -(-square.rows // rows)
    centre = (torch.arange(blocks, device=device) * rows + rows / 2) * (square.keys / square.rows)
    starts = (centre - size / 2).round().long().clamp(0, square.keys - size)
    samples = min(options.sample_size, square.keys) if square.keys > size else 0
    return Tiling(rows, size, samples, starts)


def projections(options: Options, dim: int, seed: int, device: torch.device) -> Tensor:
    """Random directions `[dim, lsh_num_projs]`, fp32; the same for all heads and for queries and
    keys."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(dim, options.lsh_num_projs, generator=generator, device="cpu").to(device)


def hashes(x: Tensor, directions: Tensor) -> Tensor:
    """Angular hash of vectors `[..., D]`: int64 `[...]`, the rank of their signs in Gray code, so
    that buckets next to each other differ in one sign."""
    signs = (x.float() @ directions > 0).long()
    code = (signs << torch.arange(signs.shape[-1], device=x.device)).sum(-1)
    for shift in (16, 8, 4, 2, 1):
        code = code ^ (code >> shift)
    return code


def sampled_ranks(square: Square, samples: int, seed: int, device: torch.device) -> Tensor:
    """Ranks of the sampled keys in the sorted order, int64 `[samples]`: each key once at most, its
    own draw for every square, the same whatever else is in the batch. All heads share it, so that a
    process which holds some of them draws the same; each head has an order of its own, so they
    sample different keys."""
    place = (square.first * 1_000_003 + square.key_first) * 1_000_003 + square.key_end
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_033 + place) % 2**63)
    return torch.randperm(square.keys, generator=generator, device="cpu")[:samples].to(device)


def flops(
    options: Options, first: int, end: int, dim: int, value_dim: int, since: int = 0
) -> tuple[int, int, int]:
    """FLOPs of hashing and of attention, and keys read, for one query head's rows `first` to
    `end - 1`, of which those from `since` on count."""
    leaves, levels = split(first, end, options.min_seq_len)
    since, read = max(first, since), 0
    for leaf in leaves:
        low, high = max(leaf.first, since) - leaf.start, leaf.end - leaf.start
        read += max(0, high * (high + 1) // 2 - low * (low + 1) // 2)
    products = read
    for square in (square for level in levels for square in level):
        own = tile_square(square, options, torch.device("cpu"))
        rows = max(0, square.end - max(square.first, since))
        products += rows * (own.size + own.samples)
        # a sampled key in the own block is read there already: those outside it count, on average
        read += rows * (own.size + own.samples * (square.keys - own.size) // square.keys)
    hashing = (end - first + end) * 2 * dim * options.lsh_num_projs if levels else 0
    return hashing * (end - since) // (end - first), products * 2 * (dim + value_dim), read


def sized(config: HiPConfig, tokens: int) -> dict[str, int]:
    """Options with which a row of a text of `tokens` reads about as many keys, on average, as the
    settings say. A row meets half a leaf, and in half of the levels an own block and a sample,
    which are made alike.
    """
    keys = config.sink + config.budget + config.window + config.block_q // 2
    leaf, levels = tokens, 0
    while leaf > keys:
        leaf, levels = -(-leaf // 2), levels + 1
    each = max(1, (keys - leaf // 2) // max(levels, 1))
    return {"min_seq_len": leaf, "block_size": each, "sample_size": each}


METHOD = base.Method(
    "HyperAttention: blocks of keys that hash alike, and a random sample that stands for the rest",
    options=Options,
    dense_reason=dense_reason,
    sized=sized,
)
