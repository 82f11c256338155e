"""What one attention call takes, against PyTorch's own attention on the same tensors.

Every figure is a median of interleaved runs (PyTorch's, then each of the settings, and again), so
that a busy machine slows both sides alike. Queries, keys and values are seeded standard normal
noise: the cost of the sparse path does not depend on what is in them. What the attention is worth
on real text is for `fidelity` and `passkey` to say.

Prefill is one causal call over the whole context. Decode is one token against a cache, once
*amortised* over steps that share selections as they do in generation, once *refreshed*, with a
selection of its own for every step. This module times on a CPU; `gpu_latency` times on a GPU with
the same calls and the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import lcm
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hip_hf.attention import Result, attend
from hip_hf.config import HiPConfig
from hip_hf.eval.reporting import plots, report
from hip_hf.eval.reporting.resumable import Resumable, Rows
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.state import DecodeState

TIMED_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PREFILL_LENGTHS = [1024 * 2**i for i in range(8)]  # 1K to 128K
DECODE_LENGTHS = PREFILL_LENGTHS[3:]
PREFILL, AMORTISED, REFRESHED = "prefill", "decode amortised", "decode refreshed"
CPU = torch.device("cpu")
# Prefill lengths over which the growth of its time is fitted.
FIT_RANGE = (16384, 131072)
# A first run of this many seconds needs no warm-up before it, and counts.
NO_WARM_UP = 10.0
# Runs of one call that are longer than this together, in seconds, are not repeated further.
ENOUGH = 60.0


@dataclass(frozen=True)
class TimingPlan:
    """What to measure. `settings` has a name for each; `repeats` is for calls that are not slow:
    `enough` seconds of one are."""

    prefill: Sequence[int] = tuple(PREFILL_LENGTHS)
    decode: Sequence[int] = tuple(DECODE_LENGTHS)
    dtypes: Sequence[str] = ("bf16", "fp32")
    settings: dict[str, HiPConfig] = field(default_factory=lambda: {"defaults": HiPConfig()})
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    repeats: int = 5
    seed: int = 0
    device: torch.device = CPU
    batch: int = 1
    enough: float = ENOUGH

    def random(
        self, dtype: str, length: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q `[batch, heads, rows, head_dim]`, and k and v of `length` tokens, drawn where they are
        used."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        shapes = ((self.heads, rows), (self.kv_heads, length), (self.kv_heads, length))
        # on a GPU not as fp32: a long one would not fit beside the others
        drawn = torch.float32 if self.device == CPU else TIMED_DTYPES[dtype]
        options: dict[str, Any] = dict(generator=generator, device=self.device, dtype=drawn)
        sizes = [(self.batch, *shape, self.head_dim) for shape in shapes]
        q, k, v = (torch.randn(size, **options).to(TIMED_DTYPES[dtype]) for size in sizes)
        return q, k, v

    def variants(self) -> tuple[dict[tuple[str, str], HiPConfig], dict[tuple[str, str], int]]:
        """Settings of decode by phase and name, and how many steps make a run of them: whole
        selections and key blocks, so that each pays its share of both."""
        found: dict[tuple[str, str], HiPConfig] = {}
        for name, config in self.settings.items():
            found[AMORTISED, name] = config
            found[REFRESHED, name] = replace(config, decode_refresh=1)
        steps = {key: lcm(refresh_period(own), own.block_k) for key, own in found.items()}
        return found, steps

    @property
    def conditions(self) -> str:
        """Shapes and machine, in words."""
        on = report.machine()
        where = on["gpu"] or f"interpreted on {on['cpu']}"
        if self.device == CPU:
            where = f"{on['cpu']}, {on['threads']} threads"
        heads = f"{self.heads} query heads, {self.kv_heads} key heads"
        return f"B={self.batch}, {heads}, D={self.head_dim}; {where}, torch {on['torch']}"


def wall(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a run, by the machine's clock."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


class TimedRun:
    """Something to time by `clock`. `seconds` are those of the runs that count; `result` is what
    the last of them returned."""

    def __init__(
        self, run: Callable[[], Any], clock: Callable[[Callable[[], Any]], tuple[float, Any]] = wall
    ) -> None:
        self.run, self.clock = run, clock
        self.seconds: list[float] = []
        self.wanted = 0  # not known before the first run
        self.result: Any = None

    def once(self) -> float:
        """Run once, keep the result, and return the seconds."""
        self.result = None  # so that no two outputs are held at a time
        seconds, self.result = self.clock(self.run)
        return seconds

    def first(self, repeats: int, enough: float = ENOUGH) -> None:
        """The run that says how many are worth it: a warm-up, or if it was long, the first that
        counts."""
        taken = self.once()
        self.wanted = max(1, min(repeats, int(enough / taken)))
        if taken >= NO_WARM_UP:
            self.seconds.append(taken)


def interleave(calls: Sequence[TimedRun], repeats: int, enough: float = ENOUGH) -> None:
    """Run the calls in turn, until each has as many runs as it wants."""
    for call in calls:
        if not call.wanted:
            call.first(repeats, enough)
    while waiting := [call for call in calls if len(call.seconds) < call.wanted]:
        for call in waiting:
            call.seconds.append(call.once())


def baseline(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The baseline: PyTorch's attention, as Transformers calls it. q is `[B, Hq, Tq, D]`, k and v
    are `[B, Hkv, T, D]`, and the output is like q."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def ours(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: HiPConfig,
    state: DecodeState | None = None,
) -> Result:
    """Attend to the same tensors by `hip`, which may fall back to dense attention."""
    problem = AttentionProblem(q, k, v, make_spans(q, k), q.shape[-1] ** -0.5)
    return attend(problem, config, state=state)


class GrowingSteps:
    """`count` decode steps a run, on a cache that holds `length` keys at the first: each step's
    keys are a view of one buffer, so that growing it copies nothing. Every run goes on where the
    one before ended."""

    def __init__(
        self, tensors: tuple[torch.Tensor, ...], length: int, count: int, config: HiPConfig | None
    ) -> None:
        self.q, self.k, self.v = tensors
        self.length, self.count, self.config = length, count, config
        self.state = DecodeState()

    def __call__(self) -> Result | None:
        result = None
        for step in range(self.count):
            q = self.q[:, :, step : step + 1]
            k, v = self.k[:, :, : self.length], self.v[:, :, : self.length]
            if self.config is None:
                baseline(q, k, v)
            else:
                result = ours(q, k, v, self.config, self.state)
            self.length += 1
        return result


def refresh_period(config: HiPConfig) -> int:
    """Decode steps after which everything has been selected anew: with an interval for each stage,
    the first, the longest."""
    refresh = config.decode_refresh
    return refresh if isinstance(refresh, int) else refresh[0]


def prefill_rows(plan: TimingPlan, dtype: str, length: int) -> Rows:
    """One row per setting, all against the same runs of PyTorch's attention."""
    q, k, v = plan.random(dtype, length, length)
    dense, calls = TimedRun(partial(baseline, q, k, v)), {}
    for name, config in plan.settings.items():
        calls[PREFILL, name] = TimedRun(partial(ours, q, k, v, config))
    return rows_of(plan, dtype, length, calls, dense, dict.fromkeys(calls, 1), 1)


def decode_rows(plan: TimingPlan, dtype: str, length: int) -> Rows:
    """Two rows per setting: amortised, and refreshed at every step. Times are per step."""
    variants, counts = plan.variants()
    most, calls = max(counts.values()), {}
    tensors = plan.random(dtype, length + most * (plan.repeats + 1), most)
    dense = TimedRun(GrowingSteps(tensors, length, most, None))
    for key, config in variants.items():
        calls[key] = TimedRun(GrowingSteps(tensors, length, counts[key], config))
    return rows_of(plan, dtype, length, calls, dense, counts, most)


def rows_of(
    plan: TimingPlan,
    dtype: str,
    length: int,
    calls: dict[tuple[str, str], TimedRun],
    dense: TimedRun,
    steps: dict[tuple[str, str], int],
    dense_steps: int,
) -> Rows:
    """Time all, and make a row of each of the calls (by phase and name): per step of a run."""
    interleave([dense, *calls.values()], plan.repeats)
    sdpa_ms, rows = 1000 * median(dense.seconds) / dense_steps, []
    for (phase, name), call in calls.items():
        hip_ms = 1000 * median(call.seconds) / steps[phase, name]
        row = dict(phase=phase, dtype=dtype, length=length, settings=name)
        row |= dict(hip_ms=hip_ms, sdpa_ms=sdpa_ms, times_faster=sdpa_ms / hip_ms)
        said = call.result
        row |= dict(path=said.path, reason=said.reason, keys_read=said.density)
        rows.append(row | dict(runs=len(call.seconds), sdpa_runs=len(dense.seconds)))
    return rows


def latency_rows(plan: TimingPlan, kept: Resumable | None = None) -> Rows:
    """Rows of everything in the plan that `kept` has not yet."""
    kept = kept or Resumable()
    kept.expect("", len(plan.dtypes) * (len(plan.prefill) + len(plan.decode)))
    phases = (("prefill", plan.prefill, prefill_rows), ("decode", plan.decode, decode_rows))
    rows = []
    with torch.no_grad():
        for phase, lengths, run in phases:
            for dtype, length in product(plan.dtypes, lengths):
                what = f"{phase}, {dtype}, {plots.short(length)} tokens"
                rows += kept.get((phase, dtype, length), partial(run, plan, dtype, length), what)
    return rows


def fit_exponent(lengths: Sequence[float], times: Sequence[float]) -> float | None:
    """The `p` of `time = c * length ** p` by least squares of the logarithms; None for fewer than
    two lengths."""
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0]) if len(lengths) > 1 else None


def exponents(rows: Rows) -> Rows:
    """How prefill times grow with the length between 16K and 128K: those of `hip` where it was
    sparse, and those of PyTorch."""
    fits: dict[tuple[str, str], Rows] = {}
    for row in rows:
        if row["phase"] == PREFILL:
            own = fits.setdefault((row["dtype"], row["settings"]), [])
            if FIT_RANGE[0] <= row["length"] <= FIT_RANGE[1] and row["path"] == "sparse":
                own.append(row)
    found = []
    for (dtype, name), own in fits.items():
        lengths = [row["length"] for row in own]
        fit: dict[str, Any] = {"dtype": dtype, "settings": name, "lengths": lengths}
        for side in ("hip", "sdpa"):
            fit[side] = fit_exponent(lengths, [row[f"{side}_ms"] for row in own])
        found.append(fit)
    return found
