"""Prints the table of the GPU kernels (`docs/performance.md`): FLOPs, bytes, floor and model of each call and of each of its
kernels, and what was measured.

python -m hip_hf.eval.floors [--gpu A100] [--lengths 8192,131072] [--key-heads 4] [--settings '{"rescore": 4}'] [--json]
                             [--measured FOLDER/summary.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hip_hf.config import HiPConfig
from hip_hf.eval import kernel_costs as costs
from hip_hf.eval.kernel_costs import GPUS, TARGETS, Cost, Shape
from hip_hf.methods import hyper

LENGTHS = (8192, 32768, 131072, 1 << 20)
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
# What the profile of `gpu_run` calls that whose kernels are rows of the table.
PROFILED = {"prompt": "prefill", "gradients": "backward", "decode": "decode", "hyper": "hyper", "delta": "delta"}
# Rows between the dense ones where Delta correction is timed: the paper's.
GAMMA = 64


# The costs of what is launched, one after the other; and the tensors like q and like K that must be moved at least (None: what is
# gathered is read once anyway).
Step = tuple[Callable[[int], list[Cost]], tuple[int, int] | None]


def calls(config: HiPConfig, shape: Shape) -> dict[str, Step]:
    """What is called: selection and attention of a prompt, its gradients, decode steps; and PyTorch's dense attention."""
    selecting = (costs.pyramid, costs.need, costs.vote, costs.searches)

    def of(*parts: Callable[[int, HiPConfig, Shape], Cost]) -> Callable[[int], list[Cost]]:
        return lambda tokens: [part(tokens, config, shape) for part in parts]

    return {
        "prefill": (of(*selecting, costs.prefill), (2, 2)),
        "prefill: selection": (of(*selecting), (1, 1)),
        "prefill: dense": (lambda t: [costs.dense_prefill(t, shape)], (2, 2)),
        "backward": (of(costs.query_gradients, costs.key_gradients), (4, 4)),
        "backward: dense": (lambda t: [costs.dense_prefill(t, shape).times(2.5)], (4, 4)),
        "decode, amortised": (lambda t: [costs.decode(t, config, shape, config.decode_refresh)], None),
        "decode, refreshed each step": (lambda t: [costs.decode(t, config, shape, 1)], None),
        "decode: dense": (lambda t: [costs.dense_decode(t, shape)], None),
    }


def kernels(config: HiPConfig, shape: Shape) -> dict[str, Step]:
    """The kernels of each kind of call, a decode step's as its share of the steps that one selection serves."""
    options = hyper.Options()

    def of(part: Callable[[int, HiPConfig, Shape], Cost], steps: int = 1) -> Callable[[int], list[Cost]]:
        return lambda tokens: [part(tokens, config, shape).times(1 / steps)]

    refresh = config.decode_refresh
    return {
        "prefill: tiles_kernel": (of(costs.pyramid), (0, 1)),
        "prefill: need_kernel": (of(costs.need), (1, 1)),
        "prefill: vote_kernel": (of(costs.vote), None),
        "prefill: select_kernel": (of(costs.searches), (0, 1)),
        "prefill: attend_kernel": (of(costs.prefill), (2, 2)),
        "backward: query_gradient_kernel": (of(costs.query_gradients), (4, 2)),
        "backward: key_gradient_kernel": (of(costs.key_gradients), (2, 4)),
        "decode: append_kernel": (lambda t: [costs.appended(config, shape)], None),
        "decode: need_kernel": (of(costs.step_need, refresh), None),
        "decode: select_kernel": (of(costs.step_search, refresh), None),
        "decode: choose_kernel": (lambda t: [costs.choice(config, shape).times(1 / refresh)], None),
        "decode: attend_kernel": (of(costs.step_attention), None),
        "decode: combine_kernel": (lambda t: [costs.combination(shape)], None),
        "hyper: hash_kernel": (lambda t: [costs.hashing(t, options, shape)], (1, 1)),
        "hyper: attend_kernel": (lambda t: [costs.leaves(t, options, shape)], (2, 2)),
        "hyper: square_kernel": (lambda t: [costs.squares(t, options, shape)], (2, 2)),
        "delta: attend_kernel": (lambda t: [costs.prefill(t, config, shape), costs.anchors(t, GAMMA, shape)], (2, 2)),
        "delta: spread_kernel": (lambda t: [costs.spreading(t, shape)], None),
    }


def rows(
    lengths: tuple[int, ...],
    config: HiPConfig,
    shape: Shape,
    gpu: str = "H200",
    measured: Mapping[tuple[str, int], float] = NOTHING,
) -> list[dict[str, float | int | str | None]]:
    """One row per call or kernel, and length: TFLOP, GB, and milliseconds on `gpu`.

    `floor`: products, or every tensor moved once; `model`: products, or all gathers from memory. `measured`: milliseconds by name
    and length.
    """
    found = []
    for name, (step, tensors) in (calls(config, shape) | kernels(config, shape)).items():
        for tokens in lengths:
            parts = step(tokens)
            cost, model = sum(parts, costs.NO_COST), sum(part.milliseconds(gpu) for part in parts)
            least = cost if tensors is None else Cost(cost.flops, costs.prompt_once(tokens, shape, *tensors).bytes)
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
    names = kernels(HiPConfig(), Shape())
    for row in steps["profile"]["rows"]:
        name = f"{PROFILED[row['what']]}: {row['part']}"
        if name in names:
            found[name, row["length"]] = row["ms"]
    device = steps["prefill"]["machine"].get("device", "")
    return next((gpu for gpu in GPUS if gpu in device), "H200"), found


def table(found: list[dict[str, float | int | str | None]], gpu: str = "H200") -> str:
    """`rows` as Markdown, a line for each call and kernel, and a column for each length."""
    lengths = list(dict.fromkeys(row["tokens"] for row in found))
    cells = {(row["step"], row["tokens"]): row for row in found}
    lines = [f"| {gpu}, ms: floor / model / measured | {' | '.join(f'{tokens:,}' for tokens in lengths)} |"]
    lines.append("|---" * (1 + len(lengths)) + "|")
    for name in dict.fromkeys(row["step"] for row in found):
        times = [[cells[name, tokens][time] for time in ("floor", "model", "measured")] for tokens in lengths]
        shown = (" / ".join("" if time is None else f"{time:.3g}" for time in three).rstrip() for three in times)
        lines.append(f"| {name} | {' | '.join(shown)} |")
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
