"""Prints the table of the GPU kernels (`docs/performance.md`): FLOPs, bytes, floor and model of
each call and of each of its kernels, and what was measured. HyperAttention's and Delta correction's
formulas are here, too.

python benchmarks/roofline.py [--gpu A100] [--lengths 8192,131072] [--key-heads 4] [--settings
                              '{"rescore": 4}'] [--json] [--measured FOLDER/summary.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from hip_hf.backends.triton.hyper import rows_of_square
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import kernel_costs as costs
from hip_hf.eval.measure.gpu_shapes import (
    FP32_BYTES,
    GPU_PROCESSORS,
    GPU_TARGETS,
    GPUS,
    NO_COST,
    KernelCost,
    Shape,
    gpu_of,
)
from hip_hf.eval.measure.latency import refresh_period
from hip_hf.methods import hyper

LENGTHS = (8192, 32768, 131072, 1 << 20)
# Where the summary of `benchmarks/gpu_run.py` is put once there is one.
MEASURED = Path(__file__).parent / "results" / "gpu_run.json"
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
TableRow = dict[str, float | int | str | None]
# What the profile of `gpu_run` calls that whose kernels are rows of the table.
PROFILED = {
    "prompt": "prefill",
    "gradients": "backward",
    "decode": "decode",
    "hyper": "hyper",
    "delta": "delta",
}
# Rows between the dense ones where Delta correction is timed: the paper's.
GAMMA = 64
# The tensors like q and like K that must be moved at least; of what is not here, what one program a
# head would move.
TENSORS = {
    "prefill": (2, 2), "prefill: selection": (1, 1), "prefill: dense": (2, 2), "backward": (4, 4),
    "backward: dense": (4, 4), "prefill: tiles_kernel": (0, 1), "prefill: need_kernel": (1, 1),
    "prefill: select_kernel": (0, 1), "prefill: attend_kernel": (2, 2),
    "backward: query_gradient_kernel": (4, 2), "backward: key_gradient_kernel": (2, 4),
    "hyper: hash_kernel": (1, 1), "hyper: attend_kernel": (2, 2), "hyper: square_kernel": (2, 2),
    "delta: tiles_kernel": (0, 1), "delta: need_kernel": (1, 1), "delta: select_kernel": (0, 1),
    "delta: attend_kernel": (2, 2),
}  # fmt: skip


def hashing(tokens: int, options: hyper.Options, shape: Shape) -> KernelCost:
    """HyperAttention's hashes of queries, by query head, and of keys, by key head, where there is a
    square."""
    if tokens <= options.min_seq_len:
        return NO_COST
    vectors = tokens * (shape.query_heads + shape.key_heads)
    return KernelCost(
        2 * vectors * shape.dim * options.lsh_num_projs,
        vectors * (shape.dim * shape.size + torch.int32.itemsize),
    )


def leaves(tokens: int, options: hyper.Options, shape: Shape) -> KernelCost:
    """HyperAttention's exact parts: short prompts, side by side, whose results are in fp32."""
    pairs = sum(
        (leaf.end - leaf.first) ** 2 / 2 for leaf in hyper.split(0, tokens, options.min_seq_len)[0]
    )
    gather = (
        pairs / costs.DENSE_BLOCK * shape.gathered("prefill", costs.DENSE_BLOCK, shape.key_heads, 1)
    )
    return KernelCost(
        4 * pairs * shape.query_heads * shape.dim, gather + tokens * (shape.row + shape.result)
    )


def squares(tokens: int, options: hyper.Options, shape: Shape) -> KernelCost:
    """HyperAttention's squares: each block of rows with its own block of keys and a sample. Rows go
    on from what they have."""
    found, cpu = NO_COST, torch.device("cpu")
    for square in (
        square for level in hyper.split(0, tokens, options.min_seq_len)[1] for square in level
    ):
        own = hyper.tile_square(square, options, cpu)
        keys, rows = own.size + own.samples, rows_of_square(shape.tile("hyper squares"), own.rows)
        gather = (
            len(own.starts)
            * ceil(own.rows / rows)
            * shape.query_heads
            * keys
            * 2
            * shape.dim
            * shape.size
        )
        moved = gather + square.rows * (shape.row + 2 * shape.result)
        found += KernelCost(4 * square.rows * keys * shape.query_heads * shape.dim, moved)
    return found


def hyper_kernels(
    tokens: int, config: HiPConfig, options: hyper.Options, shape: Shape
) -> dict[str, KernelCost]:
    """HyperAttention of a prompt, by kernel; its last rows are computed once more, densely."""
    dense, splits = costs.tail(tokens, config), costs.tail_splits(tokens, config, shape)
    last = costs.dense_keys("prefill", tokens, dense, shape, products=2) + KernelCost(
        0, shape.rows_moved(dense, splits)
    )
    return {
        "hash_kernel": hashing(tokens, options, shape),
        "attend_kernel": leaves(tokens, options, shape) + last,
        "square_kernel": squares(tokens, options, shape),
        "combine_kernel": costs.combination(dense, splits, shape),
    }


def anchor_rows(tokens: int, gamma: int, shape: Shape) -> KernelCost:
    """Delta correction's dense rows, one in `gamma`, whose results are in fp32."""
    pairs, rows = (
        tokens * tokens / (2 * gamma),
        shape.rows("prefill", shape.tile("prefill").rows, shape.key_heads),
    )
    gather = pairs / rows * shape.key_heads * 2 * shape.dim * shape.size
    return KernelCost(
        4 * pairs * shape.query_heads * shape.dim,
        gather + tokens / gamma * (shape.row + shape.result),
    )


def spreading(tokens: int, shape: Shape) -> KernelCost:
    """The differences of Delta's anchors, brought to their rows: output and log-sum-exp read and
    written."""
    return KernelCost(0, 2 * tokens * (shape.row + shape.query_heads * FP32_BYTES))


def delta_kernels(
    tokens: int, config: HiPConfig, gamma: int, shape: Shape
) -> dict[str, KernelCost]:
    """A prompt under Delta correction, whose last `gamma` rows at least are dense: the
    kernels of other prompts, its anchors, and what these bring."""
    found = costs.prompt_kernels(
        tokens, replace(config, dense_tail=max(config.dense_tail, gamma)), shape
    )
    attend = found["attend_kernel"] + anchor_rows(tokens, gamma, shape)
    return found | {"attend_kernel": attend, "spread_kernel": spreading(tokens, shape)}


def calls(tokens: int, config: HiPConfig, shape: Shape) -> dict[str, list[KernelCost]]:
    """What is called: selection and attention of a prompt, its gradients, decode steps; and
    PyTorch's dense attention. Of each its kernels, one after the other."""
    call = (tokens, config, shape)
    return {
        "prefill": [*costs.prompt_kernels(*call).values()],
        "prefill: selection": [*costs.selection_kernels(*call).values()],
        "prefill: dense": [costs.dense_prefill(tokens, shape)],
        "backward": [*costs.gradient_kernels(*call).values()],
        "backward: dense": [costs.dense_gradients(tokens, shape)],
        "decode, amortised": [*costs.step_kernels(*call, refresh_period(config)).values()],
        "decode, refreshed each step": [*costs.step_kernels(*call, 1).values()],
        "decode: dense": [costs.dense_decode(tokens, shape)],
    }


def kernels(
    tokens: int,
    config: HiPConfig,
    shape: Shape,
    options: hyper.Options | None = None,
    gamma: int = GAMMA,
) -> dict[str, list[KernelCost]]:
    """The kernels of each kind of call, a decode step's as its share of the steps that one
    selection serves. `options`: HyperAttention's, if not the paper's."""
    call = (tokens, config, shape)
    by_call = {
        "prefill": costs.prompt_kernels(*call),
        "backward": costs.gradient_kernels(*call),
        "decode": costs.step_kernels(*call, refresh_period(config)),
        "hyper": hyper_kernels(tokens, config, options or hyper.Options(), shape),
        "delta": delta_kernels(tokens, config, gamma, shape),
    }
    return {
        f"{name}: {kernel}": [cost]
        for name, found in by_call.items()
        for kernel, cost in found.items()
    }


def rows(
    lengths: tuple[int, ...],
    config: HiPConfig,
    shape: Shape,
    gpu: str = "H200",
    measured: Mapping[tuple[str, int], float] = NOTHING,
) -> list[TableRow]:
    """One row per call or kernel, and length: TFLOP, GB, and milliseconds on `gpu`.

    `floor`: products, or every tensor moved once, and in decode each key and summary by one
    program; `model`: products, or all gathers from memory. `measured`: milliseconds by name and
    length.
    """
    alone, found = replace(shape, processors=1), list[TableRow]()
    by_length = {
        tokens: calls(tokens, config, shape) | kernels(tokens, config, shape) for tokens in lengths
    }
    unshared = {
        tokens: calls(tokens, config, alone) | kernels(tokens, config, alone) for tokens in lengths
    }
    for name in by_length[lengths[0]]:
        for tokens in lengths:
            parts = by_length[tokens][name]
            cost, model = sum(parts, NO_COST), sum(part.milliseconds(gpu) for part in parts)
            least = sum(unshared[tokens][name], NO_COST)
            if name in TENSORS:
                queries, keys = TENSORS[name]
                moved = (
                    tokens
                    * (queries * shape.query_heads + keys * shape.key_heads)
                    * shape.dim
                    * shape.size
                )
                least = KernelCost(cost.flops, moved)
            own: TableRow = {
                "step": name,
                "tokens": tokens,
                "TFLOP": cost.flops / 1e12,
                "GB": cost.bytes / 1e9,
            }
            times: TableRow = {
                "floor": least.milliseconds(gpu),
                "model": model,
                "measured": measured.get((name, tokens)),
            }
            found.append({**own, **times})
    return found


def measured_in(document: dict[str, Any]) -> tuple[str, dict[tuple[str, int], float]]:
    """Of a summary of `benchmarks/gpu_run.py`, also of a run that was cut: the GPU, and
    milliseconds by step and length, of one sequence. Raises ValueError if the GPU is not known, or
    none has measured anything."""
    device = next(
        (step["machine"].get("device") for step in document["steps"] if step["machine"]), None
    )
    gpu = gpu_of(device or "")
    if gpu is None:
        raise ValueError(
            f"the device of a summary: got {device!r}, allowed: one of {', '.join(GPUS)}"
        )
    steps = {step["step"]: step["rows"] for step in document["steps"]}
    rows = [row for name in ("prefill", "decode", "backward") for row in steps.get(name, [])]
    calls = [row for row in rows if "phase" in row and row["batch"] == 1]
    found: dict[tuple[str, int], float] = {}
    for name, (phase, column) in CALLS.items():
        found |= {
            (name, row["length"]): row[column]
            for row in calls
            if row["phase"] == phase and row[column] is not None
        }
    names = kernels(LENGTHS[0], HiPConfig(), Shape())
    for row in steps.get("profile", []):
        name = f"{PROFILED[row['what']]}: {row['part']}"
        if name in names:
            found[name, row["length"]] = row["ms"]
    return gpu, found


def table(found: list[dict[str, float | int | str | None]], gpu: str = "H200") -> str:
    """`rows` as Markdown, a line for each call and kernel, and a column for each length."""
    lengths = list(dict.fromkeys(row["tokens"] for row in found))
    cells = {(row["step"], row["tokens"]): row for row in found}
    columns = " | ".join(f"{tokens:,}" for tokens in lengths)
    lines = [f"| {gpu}, ms: floor / model / measured | {columns} |"]
    lines.append("|---" * (1 + len(lengths)) + "|")
    for name in dict.fromkeys(row["step"] for row in found):
        times = [
            [cells[name, tokens][time] for time in ("floor", "model", "measured")]
            for tokens in lengths
        ]
        shown = (
            " / ".join("" if time is None else f"{time:.3g}" for time in three).rstrip()
            for three in times
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, help="default: the one of the figures, else H200")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument(
        "--key-heads",
        type=int,
        default=Shape.key_heads,
        choices=[1, 2, 4, 8, 16, 32],
        help="of 32 query heads",
    )
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="HiPConfig's fields as JSON"
    )
    parser.add_argument(
        "--measured", type=Path, default=MEASURED, help="summary.json of benchmarks/gpu_run.py"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    there = given.measured.exists()
    on, measured = (
        measured_in(json.loads(given.measured.read_text(encoding="utf-8")))
        if there
        else ("H200", {})
    )
    gpu = given.gpu or on
    shape = Shape(
        key_heads=given.key_heads, target=GPU_TARGETS[gpu], processors=GPU_PROCESSORS[gpu]
    )
    lengths = tuple(map(int, given.lengths.split(",")))
    found = rows(
        lengths, HiPConfig.from_dict(given.settings), shape, gpu, measured if gpu == on else {}
    )
    print(json.dumps(found, indent=1) if given.json else table(found, gpu))


if __name__ == "__main__":
    main()
