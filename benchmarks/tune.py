"""Writes `backends/triton/common/tuning_table.json`: launch configurations of attention kernels by
architecture and head dim.

    python benchmarks/tune.py [--targets sm90,sm80] [--dims 64,128,256]

Candidates stand in order of preference. Those that spill, do not fit, or miss the tensor cores drop
out, which is found by compiling, without a GPU. Where the machine has a GPU of the target, the
fastest of the rest is taken, else the first. What the launches of a selection are is said by
`search.py`: `gpu_run.py` times others beside them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hip_hf.backends.triton.common.tuning import TILES, Tile, target_of, tile_of
from hip_hf.backends.triton.compile import budget
from hip_hf.backends.triton.compile.catalogue import (
    decode_launches,
    key_launches,
    prefill_launches,
    query_launches,
    square_launches,
)
from hip_hf.backends.triton.compile.examples import Example, example, with_extension
from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.pyramid import KeyPyramid
from hip_hf.backends.triton.selection.search import (
    SearchTile,
    SelectionBuffers,
    search_constants,
    select,
)
from hip_hf.backends.triton.selection.votes import need_arguments, need_kernel
from hip_hf.config import HiPConfig

TABLE = Path(__file__).parents[1] / "hip_hf/backends/triton/common/tuning_table.json"
# Launches of both dtypes share an entry; the first is timed.
TOKENS, DTYPES = 32768, (torch.bfloat16, torch.float16)
REPEATS = 20

LAUNCHES: dict[str, Callable[[Example, Tile], list[Launch]]] = {
    "prefill": prefill_launches,
    "decode": decode_launches,
    "prefill extended": lambda x, tile: prefill_launches(with_extension(x), tile)[:1],
    "decode extended": lambda x, tile: decode_launches(with_extension(x), tile)[:1],
    "backward queries": query_launches,
    "backward keys": key_launches,
    "hyper squares": square_launches,
}
# With three stages two tiles of keys and values are in flight while one is multiplied.
WIDE = [
    (128, 64, 8, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2),
    (64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2),
]  # fmt: skip
CANDIDATES = {
    "prefill": [*WIDE, (64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
    "decode": [
        (16, 64, 4, 3), (16, 32, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1),
        (16, 16, 4, 1),
    ],
    "prefill extended": [
        (64, 32, 8, 3), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 4, 2), (32, 32, 8, 1),
        (32, 32, 4, 1),
    ],
    "decode extended": [
        (16, 32, 4, 3), (16, 32, 4, 2), (16, 32, 8, 2), (16, 32, 4, 1), (16, 16, 4, 1),
    ],
    "backward queries": [*WIDE, (64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
    "hyper squares": [*WIDE, (64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
    "backward keys": [
        (64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 2), (32, 64, 8, 1), (64, 32, 4, 2),
        (32, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1),
    ],
}  # fmt: skip
# Launches of a selection: the look at what a prompt's rows find near, its search, and that of a
# decode step with its choice.
SELECTIONS: dict[str, list[Tile] | list[SearchTile]] = {
    "votes": [Tile(*values) for values in WIDE],
    "search": [
        SearchTile(32, 32, 32, stages=4), SearchTile(32, 32, 32, stages=3),
        SearchTile(32, 32, 64, stages=3), SearchTile(32, 64, 64, stages=2),
        SearchTile(32, 64, 64, stages=3), SearchTile(16, 32, 32, stages=4),
        SearchTile(16, 64, 64, stages=3), SearchTile(32, 32, 32, 4, 4),
        SearchTile(32, 32, 32, 16, 4),
    ],
}  # fmt: skip
SELECTIONS["decode search"] = SELECTIONS["search"]

# Sums in fp32 that a thread may keep, of its 255 registers.
MOST_ACCUMULATORS = 64


def accumulators(kernel: str, target: str, dim: int, tile: Tile) -> int:
    """Sums that a thread keeps over all steps."""
    sums = min(2 * dim, 256) * tile.keys if kernel == "backward keys" else tile.rows * dim
    return sums // (budget.gpu_target(target).warp_size * tile.warps)


def examples(
    kernel: str, dim: int, dtype: torch.dtype, device: str = "meta", tokens: int = TOKENS
) -> list[Example]:
    """What a configuration must serve; the first of them is timed."""
    fields: dict[str, Any] = dict(
        tokens=tokens,
        device=device,
        **(dict(rows=1, block_q=1) if kernel.startswith("decode") else {}),
    )
    found = [example(dim, dtype, **fields)]
    if device == "meta" and kernel in ("prefill", "decode"):
        found.append(example(dim, dtype, paged=True, **fields))
    return found


def problems(kernel: str, target: str, dim: int, tile: Tile) -> list[str]:
    """What is wrong with a configuration, found by compiling; the first thing is enough."""
    for dtype in DTYPES:
        for x in examples(kernel, dim, dtype):
            for launch in LAUNCHES[kernel](x, tile):
                spent = budget.spend(launch, target, dim, dtype)
                if spent.problem:
                    return [f"{spent.kernel}, {spent.dtype}: {spent.problem}"]
    return []


def present(kernel: str, target: str, dim: int, dtype: torch.dtype) -> Tile | SearchTile:
    """What is launched today, in a call like those of `examples`."""
    if "search" not in kernel:
        return tile_of("prefill" if kernel == "votes" else kernel, target, dim, dim, dtype)
    x = examples(kernel, dim, dtype)[0]
    fixed = search_constants(
        HiPConfig(),
        x.q.shape[1] // x.kv.heads,
        dim,
        dtype,
        x.part.reads.block_q,
        TOKENS,
        target,
        "decode" in kernel,
    )
    return SearchTile(
        fixed["BLOCK_M"],
        fixed["FEATURES"],
        fixed["FEATURES_LAST"],
        fixed["num_warps"],
        fixed["num_stages"],
    )


def candidates(kernel: str, target: str, dim: int) -> list[Tile] | list[SearchTile]:
    """Launches to try, the most promising first."""
    if kernel in SELECTIONS:
        return SELECTIONS[kernel]
    tiles = [Tile(*values) for values in CANDIDATES[kernel]]
    return [tile for tile in tiles if accumulators(kernel, target, dim, tile) <= MOST_ACCUMULATORS]


def selecting(kernel: str, x: Example, tiles: list[Any]) -> list[Callable[[], None]]:
    """Calls of a part of the selection with each of the launches; a step's selects anew each
    time."""
    config, sequences, block_q = HiPConfig(), x.part.sequences, x.part.reads.block_q
    stateful = block_q == 1
    if kernel == "votes":
        near, need = (x.q.new_empty(1, *x.q.shape[1:3], dtype=torch.float32) for _ in range(2))
        call = (x.q, x.kv, sequences, config, x.logits, block_q, None, near, need)
        launches = [need_arguments(*call, shape=tile) for tile in tiles]
        return [partial(need_kernel[grid], **arguments) for grid, arguments in launches]
    shape = (1, x.kv.heads, x.q.shape[-1], sequences.max_keys)
    pyramid = KeyPyramid.empty(config, shape, x.q)
    pyramid.extend(x.kv, sequences, block_q, append=False)
    blocks = (1, x.kv.heads, sequences.blocks(block_q))
    into = SelectionBuffers.empty(config, blocks, x.q.device, keep=stateful)

    def call_select(tile: SearchTile) -> None:
        if into.made is not None:
            into.made.fill_(SelectionBuffers.NEVER)
        select(x.q, pyramid.table, x.kv, sequences, config, x.logits, block_q, into, tile)

    return [partial(call_select, tile) for tile in tiles]


def milliseconds(
    kernel: str,
    dim: int,
    tiles: list[Any],
    device: str = "cuda",
    dtype: torch.dtype = DTYPES[0],
    tokens: int = TOKENS,
    repeats: int = REPEATS,
) -> list[float]:
    """What the first launch, or a part of the selection, takes with each of the configurations:
    medians of interleaved runs."""
    from hip_hf.eval.measure.gpu_runs import DeviceClock, Timed
    from hip_hf.eval.measure.latency import interleave

    x, clock = examples(kernel, dim, dtype, device, tokens)[0], DeviceClock(torch.device(device))

    if kernel in SELECTIONS:
        works = selecting(kernel, x, tiles)
    else:
        launches = [LAUNCHES[kernel](x, tile)[0] for tile in tiles]
        works = [partial(launch.kernel[launch.grid], **launch.arguments) for launch in launches]
    calls = [Timed(work, clock) for work in works]
    interleave(calls, repeats)
    return [1000 * median(call.seconds) for call in calls]


def choose(kernel: str, target: str, dim: int, here: str) -> tuple[int, int, int, int] | None:
    """The configuration for one entry of the table; None if no candidate is fit."""
    good = []
    for values in CANDIDATES[kernel]:
        if accumulators(kernel, target, dim, Tile(*values)) > MOST_ACCUMULATORS:
            continue  # it would spill, after a long time
        why = problems(kernel, target, dim, Tile(*values))
        print(f"{kernel}, {target}, D={dim}, {values}: {why[0] if why else 'fits'}", flush=True)
        if not why:
            good.append(values)
            if target != here:
                break
    if not good:
        return None
    if target != here:
        return good[0]
    times = dict(
        zip(good, milliseconds(kernel, dim, [Tile(*values) for values in good]), strict=True)
    )
    print(
        f"{kernel}, {target}, D={dim}: "
        + ", ".join(f"{values} {time:.3f} ms" for values, time in times.items())
    )
    return min(times, key=lambda values: times[values])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default="sm80,sm86,sm89,sm90,sm100,sm120,gfx942")
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--kernels", default=",".join(LAUNCHES))
    given = parser.parse_args()
    missing = []
    here = target_of(torch.empty(0, device="cuda")) if torch.cuda.is_available() else ""
    for target in given.targets.split(","):
        for kernel in given.kernels.split(","):
            for dim in map(int, given.dims.split(",")):
                found = choose(kernel, target, dim, here)
                if found is None:
                    missing.append(f"{kernel}, {target}, D={dim}")
                else:
                    TILES.setdefault(kernel, {}).setdefault(target, {})[dim] = list(found)
            write(TILES)
    if missing:
        raise SystemExit(f"no candidate is fit for: {'; '.join(missing)}")


def write(tiles: dict[str, dict[str, dict[int, list[int]]]]) -> None:
    """The table, a line for each target of a kernel."""
    kernels = []
    for kernel, targets in sorted(tiles.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(targets[name])}" for name in sorted(targets)]
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


if __name__ == "__main__":
    main()
