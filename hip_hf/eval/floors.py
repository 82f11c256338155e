"""Prints the table of the GPU kernels (`docs/performance.md`): FLOPs, bytes, floor and model of each step, and what was measured.

python -m hip_hf.eval.floors [--gpu A100] [--lengths 8192,131072] [--key-heads 4] [--settings '{"rescore": 4}'] [--json]
                             [--measured FOLDER/summary.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.kernels.prefill import rows_of
from hip_hf.kernels.tuning import Tile, tile_of
from hip_hf.kernels.voting import Voting

# Dense bf16 TFLOP/s with fp32 sums, and TB/s of device memory: the makers' data sheets.
GPUS = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.0), "RTX 4090": (165.2, 1.008)}
TARGETS = {"H200": "sm90", "H100": "sm90", "A100": "sm80", "RTX 4090": "sm89"}
LENGTHS = (8192, 32768, 131072, 1 << 20)
# Rows of a query block where all keys are read (`kernels.prefill.dense_reads`).
DENSE_BLOCK = 64
# Where the summary of `benchmarks/gpu_run.py` is put once there is one.
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_run.json"
# What `gpu_run` calls a step: the phase of a call, and whose milliseconds.
CALLS = {
    "prefill": ("prefill", "hip_ms"),
    "prefill: selection": ("selection", "hip_ms"),
    "prefill: dense": ("prefill", "sdpa_ms"),
    "decode, amortised": ("decode amortised", "hip_ms"),
    "decode, refreshed each step": ("decode refreshed", "hip_ms"),
    "decode: dense": ("decode amortised", "sdpa_ms"),
    "backward": ("backward", "hip_ms"),
    "backward: dense": ("backward", "sdpa_ms"),
}
NOTHING: Mapping[tuple[str, int], float] = {}
# The kernels that are a step of a prompt, in its profile.
KERNELS = {"prefill: votes": ("need_kernel", "vote_kernel"), "prefill: attention": ("attend_kernel",)}


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


def votes(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Who votes in a prompt: of the rows that are asked, q, keys that they read in any case and a sample of the rest, for what
    they find near and their need; the rows of the greatest need, copied."""
    voting = Voting.of(config, shape.query_heads // shape.key_heads, config.block_q, False)
    if not (voting.weighed or voting.ranked):
        return Cost(0, 0)
    sample, share = config.method_options().sample if voting.ranked else 0, voting.asked / config.block_q
    keys = near_keys(tokens, config, config.block_q) + min(sample, tokens)
    tiles = tokens / config.block_q * shape.row_tiles("prefill", voting.asked, shape.key_heads)
    gather = tiles * shape.key_heads * keys * shape.dim * shape.size
    # near and need are written and the latter read; near is read and written once more with the copies
    copies = 2 / config.query_stride if voting.ranked else 0
    numbers, rows = (3 if voting.ranked else 2) * share + copies, share + copies
    moved = tokens * (rows * shape.row + numbers * shape.query_heads * torch.float32.itemsize)
    return Cost(2 * tokens * share * shape.query_heads * keys * shape.dim, gather + moved)


def selection(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """Selection of a whole prompt. Its pyramid reads K once."""
    voting = Voting.of(config, shape.query_heads // shape.key_heads, config.block_q, False)
    pyramid = tokens * shape.key_heads * shape.dim * shape.size * (1 + 4 / config.block_k)
    read = tokens / config.query_stride * shape.row
    searches = tokens / config.block_q * shape.lists(config)
    found = search(tokens, voting.slots, voting.walkers, config, shape).times(searches) + Cost(0, pyramid + read)
    return found + votes(tokens, config, shape)


def refresh_step(tokens: int, config: HiPConfig, shape: Shape) -> Cost:
    """The selection of a decode step: what its rows find near, if votes are by need, and the search."""
    heads = shape.query_heads // shape.lists(config)
    found = search(tokens, heads, heads, config, shape).times(shape.lists(config))
    if config.vote == "sampled":
        return found
    keys = near_keys(tokens, config, 1)
    return found + Cost(2 * shape.query_heads * keys * shape.dim, shape.key_heads * keys * shape.dim * shape.size)


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


def backward(tokens: int, config: HiPConfig, shape: Shape, shared: float = 2.0) -> Cost:
    """Three products for dQ, four for dK and dV. `shared`: key blocks selected of each tile of keys that is touched."""
    by_query = by_rows("backward queries", tokens, config, shape, products=3, rows_moved=4)  # q, dO, O, dQ
    per_tile, dense = max(1, shape.tile("backward keys").keys // config.block_k), tail(tokens, config)
    wide = keys_read(tokens, config) + min(config.budget, tokens) * (per_tile / shared - 1)  # rows meet whole tiles
    pairs = (tokens - dense) * wide + dense * tokens
    read = pairs / (per_tile * config.block_k) * shape.row * 2  # q and dO, once a tile
    return by_query + Cost(8 * pairs * shape.query_heads * shape.dim, read)


def decode(tokens: int, config: HiPConfig, shape: Shape, refresh: int) -> Cost:
    """One step of one sequence, a selection serving `refresh` steps."""
    keys, lists = min(config.sink + config.budget + config.window, tokens), shape.lists(config)
    attend = Cost(4 * shape.query_heads * keys * shape.dim, shape.gathered("decode", 1, lists, keys))
    return attend + refresh_step(tokens, config, shape).times(1 / refresh)


def dense_prefill(tokens: int, shape: Shape) -> Cost:
    row = (2 * shape.query_heads + 2 * shape.key_heads) * shape.dim * shape.size
    return Cost(2 * tokens * tokens * shape.query_heads * shape.dim, tokens * row)


def dense_decode(tokens: int, shape: Shape) -> Cost:
    return Cost(4 * shape.query_heads * tokens * shape.dim, shape.key_heads * tokens * 2 * shape.dim * shape.size)


def prompt_once(tokens: int, shape: Shape, queries: int, keys: int) -> Cost:
    """Bytes of as many tensors like q and like K of a prompt, each moved once."""
    return Cost(0, tokens * (queries * shape.query_heads + keys * shape.key_heads) * shape.dim * shape.size)


def rows(
    lengths: tuple[int, ...],
    config: HiPConfig,
    shape: Shape,
    gpu: str = "H200",
    measured: Mapping[tuple[str, int], float] = NOTHING,
) -> list[dict[str, float | int | str | None]]:
    """One row per step and length: TFLOP, GB, and milliseconds on `gpu`. "prefill" is selection, of which the votes are a part,
    and attention, one after the other.

    `floor`: products, or every tensor moved once; `model`: products, or all gathers from memory. `measured`: milliseconds by step
    and length.
    """
    # costs, one after the other; and the tensors that must be moved (None: what is gathered is read once anyway)
    steps: dict[str, tuple[Callable[[int], list[Cost]], tuple[int, int] | None]] = {
        "prefill": (lambda t: [selection(t, config, shape), prefill(t, config, shape)], (2, 2)),
        "prefill: selection": (lambda t: [selection(t, config, shape)], (1, 1)),
        "prefill: votes": (lambda t: [votes(t, config, shape)], (1, 1)),
        "prefill: attention": (lambda t: [prefill(t, config, shape)], (2, 2)),
        "prefill: dense": (lambda t: [dense_prefill(t, shape)], (2, 2)),
        "backward": (lambda t: [backward(t, config, shape)], (4, 4)),
        "backward: dense": (lambda t: [dense_prefill(t, shape).times(2.5)], (4, 4)),
        "decode, amortised": (lambda t: [decode(t, config, shape, config.decode_refresh)], None),
        "decode, refreshed each step": (lambda t: [decode(t, config, shape, 1)], None),
        "decode: dense": (lambda t: [dense_decode(t, shape)], None),
    }
    found = []
    for name, (step, tensors) in steps.items():
        for tokens in lengths:
            parts = step(tokens)
            cost, model = sum(parts, Cost(0, 0)), sum(part.milliseconds(gpu) for part in parts)
            least = cost if tensors is None else Cost(cost.flops, prompt_once(tokens, shape, *tensors).bytes)
            own = {"step": name, "tokens": tokens, "TFLOP": cost.flops / 1e12, "GB": cost.bytes / 1e9}
            times = {"floor": least.milliseconds(gpu), "model": model, "measured": measured.get((name, tokens))}
            found.append({**own, **times})
    return found


def measured_in(document: dict[str, Any]) -> tuple[str, dict[tuple[str, int], float]]:
    """Of a summary of `benchmarks/gpu_run.py`: the GPU, and milliseconds by step and length, of one sequence."""
    steps = {step["step"]: step for step in document["steps"]}
    rows = [row for name in ("prefill", "decode", "backward") for row in steps[name]["rows"]]
    calls = [row for row in rows if "phase" in row and row["batch"] == 1]
    found: dict[tuple[str, int], float] = {}
    for name, (phase, column) in CALLS.items():
        found |= {(name, row["length"]): row[column] for row in calls if row["phase"] == phase and row[column] is not None}
    for row in steps["profile"]["rows"]:
        for name, kernels in KERNELS.items():
            if row["what"] == "prompt" and row["part"] in kernels:
                found[name, row["length"]] = found.get((name, row["length"]), 0.0) + row["ms"]
    device = steps["prefill"]["machine"].get("device", "")
    return next((gpu for gpu in GPUS if gpu in device), "H200"), found


def table(found: list[dict[str, float | int | str | None]], gpu: str = "H200") -> str:
    """`rows` as Markdown."""
    times = ("floor", "model", "measured")
    lines = [f"| {gpu} | tokens | TFLOP | GB | {' | '.join(f'{name}, ms' for name in times)} |", "|---" * 7 + "|"]
    for row in found:
        figures = ["" if row[name] is None else f"{row[name]:.3g}" for name in ("TFLOP", "GB", *times)]
        lines.append(f"| {row['step']} | {row['tokens']:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, help="default: the one of the figures, else H200")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--key-heads", type=int, default=Shape.key_heads, choices=[1, 2, 4, 8, 16, 32], help="of 32 query heads")
    parser.add_argument("--settings", type=json.loads, default={}, help="HiPConfig's fields as JSON")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="summary.json of benchmarks/gpu_run.py")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    there = given.measured.exists()
    on, measured = measured_in(json.loads(given.measured.read_text(encoding="utf-8"))) if there else ("H200", {})
    gpu = given.gpu or on
    shape = Shape(key_heads=given.key_heads, target=TARGETS[gpu])
    lengths = tuple(map(int, given.lengths.split(",")))
    found = rows(lengths, HiPConfig.from_dict(given.settings), shape, gpu, measured if gpu == on else {})
    print(json.dumps(found, indent=1) if given.json else table(found, gpu))


if __name__ == "__main__":
    main()
