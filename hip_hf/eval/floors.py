"""Prints the analytical model of the GPU kernels (`docs/performance.md`): FLOPs, bytes, and the least time of each step.

python benchmarks/floors.py [--lengths 8192,131072] [--json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from math import ceil, log2

from hip_hf.config import HiPConfig

# Dense bf16 TFLOP/s with fp32 sums, and TB/s of device memory: the makers' data sheets.
GPUS = {"H200": (989.0, 4.8), "A100": (312.0, 2.0), "RTX 4090": (165.2, 1.008)}
LENGTHS = (8192, 32768, 131072, 1 << 20)


@dataclass(frozen=True)
class Shape:
    """One attention layer: query and key heads, head dim, bytes of an element."""

    query_heads: int = 32
    key_heads: int = 8
    dim: int = 128
    size: int = 2

    @property
    def groups(self) -> int:
        return self.query_heads // self.key_heads


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
        teraflops, terabytes = GPUS[gpu]
        return 1e3 * max(self.flops / (teraflops * 1e12), self.bytes / (terabytes * 1e12))


def levels(tokens: int, config: HiPConfig) -> int:
    """Levels of the pyramid that a search over `tokens` keys scores."""
    start = 2 * config.beam * config.budget
    return 1 + max(0, ceil(log2(tokens / start)))


def search(tokens: int, rows: int, config: HiPConfig, shape: Shape) -> Cost:
    """Selection for one query block of `rows` voting rows and one key head."""
    votes, candidates = rows * shape.groups, 2 * config.beam * config.budget // config.block_k
    summaries = levels(tokens, config) * min(candidates, tokens // config.block_k)
    exact = min(config.rescore * config.budget, tokens) if config.rescore > 1 else 0
    flops = votes * (4 * summaries + 2 * exact) * shape.dim
    return Cost(flops, (2 * summaries + exact) * shape.dim * shape.size)


def selection(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Selection of a whole prompt; its pyramid reads K once."""
    rows = ceil(config.block_q / config.query_stride)
    pyramid = Cost(0, tokens * shape.key_heads * shape.dim * shape.size * (1 + 4 / config.block_k))
    return search(tokens, rows, config, shape).times(tokens / config.block_q * shape.key_heads) + pyramid


def keys_read(tokens: int, config: HiPConfig) -> float:
    """Keys of a query block's tiles."""
    return min(config.sink + config.budget + config.window + config.block_q, tokens)


def prefill(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Sparse attention of a prompt, forward: two products."""
    keys = keys_read(tokens, config)
    rows = 2 * tokens * shape.query_heads * shape.dim * shape.size  # q and out
    gather = tokens / config.block_q * shape.key_heads * keys * 2 * shape.dim * shape.size
    return Cost(4 * tokens * shape.query_heads * keys * shape.dim, rows + gather)


def backward(tokens: int, config: HiPConfig, shape: Shape, shared: float = 2.0) -> Cost:
    """Three products for dQ, four for dK and dV. `shared`: key blocks selected of each tile of four that is touched."""
    keys, row = keys_read(tokens, config), shape.query_heads * shape.dim * shape.size
    by_query = Cost(6 * tokens * shape.query_heads * keys * shape.dim, prefill(tokens, config, shape).bytes + 3 * tokens * row)
    wide = keys + min(config.budget, tokens) * (4 / shared - 1)  # rows meet whole tiles
    read = tokens * wide / (4 * config.block_k) * row * 2  # q and dO, once a tile
    by_key = Cost(8 * tokens * shape.query_heads * wide * shape.dim, read)
    return by_query + by_key


def decode(tokens: int, config: HiPConfig, shape: Shape, refresh: int) -> Cost:
    """One step of one sequence, a selection serving `refresh` steps."""
    keys = min(config.sink + config.budget + config.window, tokens)
    attend = Cost(4 * shape.query_heads * keys * shape.dim, shape.key_heads * keys * 2 * shape.dim * shape.size)
    return attend + search(tokens, 1, config, shape).times(shape.key_heads / refresh)


def dense_prefill(tokens: int, shape: Shape) -> Cost:
    row = (2 * shape.query_heads + 2 * shape.key_heads) * shape.dim * shape.size
    return Cost(2 * tokens * tokens * shape.query_heads * shape.dim, tokens * row)


def dense_decode(tokens: int, shape: Shape) -> Cost:
    return Cost(4 * shape.query_heads * tokens * shape.dim, shape.key_heads * tokens * 2 * shape.dim * shape.size)


def rows(lengths: tuple[int, ...], config: HiPConfig, shape: Shape) -> list[dict[str, float | int | str]]:
    """One row per step and length: TFLOP, GB, and milliseconds at least on each GPU."""
    steps = {
        "prefill: selection": lambda t: selection(t, config, shape),
        "prefill: attention": lambda t: prefill(t, config, shape),
        "prefill: dense": lambda t: dense_prefill(t, shape),
        "backward": lambda t: backward(t, config, shape),
        "backward: dense": lambda t: dense_prefill(t, shape).times(2.5),
        "decode, amortised": lambda t: decode(t, config, shape, config.decode_refresh),
        "decode, refreshed each step": lambda t: decode(t, config, shape, 1),
        "decode: dense": lambda t: dense_decode(t, shape),
    }
    found = []
    for name, step in steps.items():
        for tokens in lengths:
            cost = step(tokens)
            times = {gpu: cost.milliseconds(gpu) for gpu in GPUS}
            found.append({"step": name, "tokens": tokens, "TFLOP": cost.flops / 1e12, "GB": cost.bytes / 1e9, **times})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = rows(tuple(map(int, given.lengths.split(","))), HiPConfig(), Shape())
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"| step | tokens | TFLOP | GB | {' | '.join(f'{gpu}, ms' for gpu in GPUS)} |")
    print("|---" * (4 + len(GPUS)) + "|")
    for row in found:
        cells = [row["step"], f"{row['tokens']:,}", *(f"{row[name]:.3g}" for name in ("TFLOP", "GB", *GPUS))]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
