"""Time one attention call of another checkout of this project against this one's, both with their
own defaults, in one interleaved run.

    git worktree add OTHER COMMIT
    python benchmarks/two_checkouts.py OTHER [--lengths 32768,131072] [--dtypes bf16,fp32]
        [--rounds 3] [--output FILE]

Each checkout has a process of its own, which keeps its tensors; the two take turns, and only one
runs at a time. A call has 8 query and 2 key heads of 128 numbers. `prefill`: a whole prompt, every
row sparse (`dense_tail=0`). `decode`: the mean of 64 steps after a prompt of that length. `ratio`:
the other checkout's time over this one's, the median of the rounds' ratios (above 1: this one is
faster). `exponent`: of prefill's time in this checkout, fitted over the lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

HEADS, KV_HEADS, DIM, STEPS = 8, 2, 128, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PHASES = ("prefill", "decode")


def times(length: int, dtype: str, phase: str) -> float:
    """Seconds of one prefill, or of one decode step, by the public API that both checkouts have."""
    from hip_hf import DecodeState, HiPConfig, hip_attention

    config = HiPConfig(dense_tail=0, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    rows = length if phase == "prefill" else STEPS
    q, k, v = (
        torch.randn(1, heads, count, DIM, generator=generator).to(DTYPES[dtype])
        for heads, count in ((HEADS, rows), (KV_HEADS, length + STEPS), (KV_HEADS, length + STEPS))
    )
    with torch.inference_mode():
        if phase == "prefill":
            start = time.perf_counter()
            hip_attention(q, k[:, :, :length], v[:, :, :length], config=config)
            return time.perf_counter() - start
        state = DecodeState()
        # The first step summarises all keys, as a prefill before it would have done.
        hip_attention(q[:, :, :1], k[:, :, :length], v[:, :, :length], config=config, state=state)
        start = time.perf_counter()
        for step in range(1, STEPS):
            end = length + step
            row = q[:, :, step : step + 1]
            hip_attention(row, k[:, :, :end], v[:, :, :end], config=config, state=state)
        return (time.perf_counter() - start) / (STEPS - 1)


def serve() -> None:
    """Answers each line `length dtype phase` with its seconds: what a checkout's process does."""
    import hip_hf

    print(Path(hip_hf.__file__).parents[1], flush=True)
    for line in sys.stdin:
        length, dtype, phase = line.split()
        print(times(int(length), dtype, phase), flush=True)


class Checkout:
    """A process that imports hip_hf from `folder`."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder), "--serve"],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._read()
        if Path(found).resolve() != folder.resolve():
            raise ValueError(f"checkout: got {folder}, but its process imports {found}")

    def ask(self, *what: object) -> float:
        """Seconds of a call."""
        assert self.process.stdin is not None
        print(*what, file=self.process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a checkout's process ended before it answered; see its error above")
        return line.strip()


def compare(
    other: Path, lengths: list[int], dtypes: list[str], rounds: int
) -> list[dict[str, Any]]:
    """A row for each dtype, phase and length."""
    from hip_hf.eval.measure.latency import fit_exponent  # which the other may not have

    old, new = Checkout(other), Checkout(Path(__file__).resolve().parents[1])
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        for phase in PHASES:
            cells: list[dict[str, Any]] = []
            for length in lengths:
                for side in (old, new):  # what is allocated or compiled once
                    side.ask(min(lengths), dtype, phase)
                pairs = [
                    (old.ask(length, dtype, phase), new.ask(length, dtype, phase))
                    for _ in range(rounds)
                ]
                seconds = [median(side) for side in zip(*pairs, strict=True)]
                ratio = median(a / b for a, b in pairs)
                row = {"dtype": dtype, "phase": phase, "length": length, "ratio": ratio}
                cells.append(row | {"other_s": seconds[0], "this_s": seconds[1]})
                print(json.dumps(cells[-1]), flush=True)
            if phase == "prefill" and len(lengths) > 1:
                cells[-1]["exponent"] = fit_exponent(lengths, [cell["this_s"] for cell in cells])
            rows += cells
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not (given.checkout / "hip_hf" / "__init__.py").is_file():
        parser.error(f"checkout: got {given.checkout}, allowed: a folder that holds hip_hf/")
    if given.serve:
        return serve()
    lengths = sorted(map(int, given.lengths.split(",")))
    rows = compare(given.checkout, lengths, given.dtypes.split(","), given.rounds)
    for row in rows:
        if "exponent" in row:
            print(f"{row['dtype']} prefill: exponent {row['exponent']:.3f}")
    if given.output:
        from hip_hf.eval.reporting.report import machine

        commit = subprocess.run(
            ["git", "-C", given.checkout, "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        result = {"other": commit, "rows": rows, "machine": machine()}
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
