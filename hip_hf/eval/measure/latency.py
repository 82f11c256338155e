"""What one attention call takes on a CPU, against PyTorch's own attention on the same tensors.

Every figure is a median of interleaved runs (PyTorch's, then each of the settings, and again), so that a busy machine
slows both sides alike. Queries, keys and values are seeded standard normal noise: the cost of the sparse path does not
depend on what is in them. What the attention is worth on real text is for `fidelity` and `passkey` to say.

Prefill is one causal call over the whole context. Decode is one token against a cache, once *amortised* over steps that share
selections as they do in generation, once *refreshed*, with a selection of its own for every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from statistics import median
from typing import Any

import numpy as np
import torch

from hip_hf.eval.measure.timing import (
    AMORTISED,
    PREFILL,
    REFRESHED,
    Call,
    GrowingSteps,
    TimingPlan,
    interleave,
    ours,
    refresh_period,
    sdpa,
)
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.resumable import Resumable

FIT_RANGE = (16384, 131072)


def measure_prefill(plan: TimingPlan, dtype: str, length: int) -> list[dict[str, Any]]:
    """One row per setting, all against the same runs of PyTorch's attention."""
    q, k, v = plan.random(dtype, length, length)
    dense = Call(partial(sdpa, q, k, v))
    calls = {name: Call(partial(ours, q, k, v, config)) for name, config in plan.settings.items()}
    interleave([dense, *calls.values()], plan.repeats)
    return [make_row(PREFILL, dtype, length, name, call, dense) for name, call in calls.items()]


def measure_decode(plan: TimingPlan, dtype: str, length: int) -> list[dict[str, Any]]:
    """Two rows per setting: amortised, and refreshed at every step. Times are per step."""
    variants = []
    for name, config in plan.settings.items():
        variants += [(AMORTISED, name, config), (REFRESHED, name, replace(config, decode_refresh=1))]
    # a run is a whole number of selections and of key blocks, so that each pays its share of both
    counts = [lcm(refresh_period(config), config.block_k) for _, _, config in variants]
    most = max(counts)
    tensors = plan.random(dtype, length + most * (plan.repeats + 1), most)
    dense = Call(GrowingSteps(tensors, length, most, None))
    calls = [Call(GrowingSteps(tensors, length, count, config)) for count, (_, _, config) in zip(counts, variants, strict=True)]
    interleave([dense, *calls], plan.repeats)
    rows = []
    for (phase, name, _), call, count in zip(variants, calls, counts, strict=True):
        rows.append(make_row(phase, dtype, length, name, call, dense, count, most))
    return rows


def make_row(
    phase: str, dtype: str, length: int, name: str, call: Call, dense: Call, steps: int = 1, dense_steps: int = 1
) -> dict[str, Any]:
    """A row of the report; the times are per step of a run."""
    hip_ms, sdpa_ms = (1000 * median(c.seconds) / n for c, n in ((call, steps), (dense, dense_steps)))
    return {
        "phase": phase,
        "dtype": dtype,
        "length": length,
        "settings": name,
        "hip_ms": hip_ms,
        "sdpa_ms": sdpa_ms,
        "times_faster": sdpa_ms / hip_ms,
        "path": call.result.path,
        "reason": call.result.reason,
        "keys_read": call.result.share,
        "runs": len(call.seconds),
        "sdpa_runs": len(dense.seconds),
    }


def measure(plan: TimingPlan, kept: Resumable | None = None) -> list[dict[str, Any]]:
    """Rows of everything in the plan that `kept` has not yet."""
    kept = kept or Resumable()
    kept.expect("", len(plan.dtypes) * (len(plan.prefill) + len(plan.decode)))
    phases = (("prefill", plan.prefill, measure_prefill), ("decode", plan.decode, measure_decode))
    rows = []
    with torch.no_grad():
        for phase, lengths, run in phases:
            for dtype in plan.dtypes:
                for length in lengths:
                    what = f"{phase}, {dtype}, {plots.short(length)} tokens"
                    rows += kept.get((phase, dtype, length), partial(run, plan, dtype, length), what)
    return rows


def fit_exponent(lengths: Sequence[float], times: Sequence[float]) -> float | None:
    """The `p` of `time = c * length ** p` by least squares of the logarithms; None for fewer than two lengths."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How prefill times grow with the length between 16K and 128K: ours where it was sparse, and PyTorch's."""
    fits = []
    kinds = dict.fromkeys((row["dtype"], row["settings"]) for row in rows if row["phase"] == PREFILL)
    for dtype, name in kinds:
        mine = [row for row in rows if (row["phase"], row["dtype"], row["settings"]) == (PREFILL, dtype, name)]
        mine = [row for row in mine if FIT_RANGE[0] <= row["length"] <= FIT_RANGE[1] and row["path"] == "sparse"]
        lengths = [row["length"] for row in mine]
        hip, dense = (fit_exponent(lengths, [row[key] for row in mine]) for key in ("hip_ms", "sdpa_ms"))
        fits.append({"dtype": dtype, "settings": name, "lengths": lengths, "hip": hip, "sdpa": dense})
    return fits
