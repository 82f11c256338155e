"""`hip-hf latency`: what one attention call takes, against PyTorch's own attention on the same tensors.

Every figure is a median of interleaved runs (PyTorch's, then each of the settings, and again), so that a busy machine
slows both sides alike. Queries, keys and values are seeded standard normal noise: the cost of the sparse path does not
depend on what is in them. What the attention is worth on real text is for `fidelity` and `passkey` to say.

Prefill is one causal call over the whole context. Decode is one token against a cache, once *amortised* over steps that share
selections as they do in generation, once *refreshed*, with a selection of its own for every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from hip_hf.attention import Result, attend
from hip_hf.config import HiPConfig
from hip_hf.eval import plots, report
from hip_hf.eval.cells import Cells
from hip_hf.eval.presets import HELP, refuse_extension, settings_of, sizes
from hip_hf.eval.publish import Json, Output, Plot, Report, Results, Targets
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.state import DecodeState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PREFILL_LENGTHS = [1024 * 2**i for i in range(8)]  # 1K to 128K
DECODE_LENGTHS = PREFILL_LENGTHS[3:]
PREFILL, AMORTISED, REFRESHED = "prefill", "decode amortised", "decode refreshed"
TITLE = "latency: "
FIT_RANGE = (16384, 131072)

# A first run of this many seconds needs no warm-up before it, and counts.
NO_WARM_UP = 10.0
# Runs of one call that are longer than this together are not repeated further.
ENOUGH = 60.0


@dataclass(frozen=True)
class Plan:
    """What to measure. `settings` has a name for each; `repeats` is for calls that are not slow."""

    prefill: Sequence[int] = tuple(PREFILL_LENGTHS)
    decode: Sequence[int] = tuple(DECODE_LENGTHS)
    dtypes: Sequence[str] = ("bf16", "fp32")
    settings: dict[str, HiPConfig] = field(default_factory=lambda: {"defaults": HiPConfig()})
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    repeats: int = 5
    seed: int = 0

    def random(self, dtype: str, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q `[1, heads, rows, head_dim]`, and k and v of `length` tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((self.heads, rows), (self.kv_heads, length), (self.kv_heads, length))
        draw = [torch.randn(1, *shape, self.head_dim, generator=generator).to(DTYPES[dtype]) for shape in shapes]
        return draw[0], draw[1], draw[2]

    @property
    def conditions(self) -> str:
        """Shapes and machine, in words."""
        on = report.machine()
        shape = f"B=1, {self.heads} query heads, {self.kv_heads} key heads, D={self.head_dim}"
        return f"{shape}; {on['cpu']}, {on['threads']} threads, torch {on['torch']}"


class Call:
    """Something to time. `seconds` are those of the runs that count; `result` is what the last of them returned."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.seconds: list[float] = []
        self.wanted = 1
        self.result: Any = None

    def once(self) -> float:
        self.result = None  # so that no two outputs are held at a time
        start = time.perf_counter()
        self.result = self.run()
        return time.perf_counter() - start

    def first(self, repeats: int) -> None:
        """The run that says how many are worth it: a warm-up, or if it was long, the first that counts."""
        taken = self.once()
        self.wanted = max(1, min(repeats, int(ENOUGH / taken)))
        if taken >= NO_WARM_UP:
            self.seconds.append(taken)


def interleave(calls: Sequence[Call], repeats: int) -> None:
    """Run the calls in turn, until each has as many runs as it wants."""
    for call in calls:
        call.first(repeats)
    while waiting := [call for call in calls if len(call.seconds) < call.wanted]:
        for call in waiting:
            call.seconds.append(call.once())


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The baseline: PyTorch's attention, as Transformers calls it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: HiPConfig, state: DecodeState | None = None) -> Result:
    """The same through `hip`, its fallbacks to dense included."""
    return attend(AttentionProblem(q, k, v, make_spans(q, k), q.shape[-1] ** -0.5), config, state=state)


class Steps:
    """`count` decode steps a run, on a cache that holds `length` keys at the first: each step's keys are a view of one
    buffer, so that growing it copies nothing. Every run goes on where the one before ended."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], length: int, count: int, config: HiPConfig | None) -> None:
        self.q, self.k, self.v = tensors
        self.length, self.count, self.config = length, count, config
        self.state = DecodeState()

    def __call__(self) -> Result | None:
        result = None
        for step in range(self.count):
            q = self.q[:, :, step : step + 1]
            k, v = self.k[:, :, : self.length], self.v[:, :, : self.length]
            if self.config is None:
                sdpa(q, k, v)
            else:
                result = ours(q, k, v, self.config, self.state)
            self.length += 1
        return result


def measure_prefill(plan: Plan, dtype: str, length: int) -> list[dict[str, Any]]:
    """One row per setting, all against the same runs of PyTorch's attention."""
    q, k, v = plan.random(dtype, length, length)
    dense = Call(partial(sdpa, q, k, v))
    calls = {name: Call(partial(ours, q, k, v, config)) for name, config in plan.settings.items()}
    interleave([dense, *calls.values()], plan.repeats)
    return [make_row(PREFILL, dtype, length, name, call, dense) for name, call in calls.items()]


def measure_decode(plan: Plan, dtype: str, length: int) -> list[dict[str, Any]]:
    """Two rows per setting: amortised, and refreshed at every step. Times are per step."""
    variants = []
    for name, config in plan.settings.items():
        variants += [(AMORTISED, name, config), (REFRESHED, name, replace(config, decode_refresh=1))]
    # a run is a whole number of selections and of key blocks, so that each pays its share of both
    counts = [lcm(config.decode_refresh, config.block_k) for _, _, config in variants]
    most = max(counts)
    tensors = plan.random(dtype, length + most * (plan.repeats + 1), most)
    dense = Call(Steps(tensors, length, most, None))
    calls = [Call(Steps(tensors, length, count, config)) for count, (_, _, config) in zip(counts, variants, strict=True)]
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


def measure(plan: Plan, cells: Cells | None = None, started: Callable[[str], None] = lambda what: None) -> list[dict[str, Any]]:
    """Rows of everything in the plan that `cells` has not yet; `started` is told what comes next."""
    cells = cells or Cells(None, {})
    phases = (("prefill", plan.prefill, measure_prefill), ("decode", plan.decode, measure_decode))
    rows = []
    with torch.no_grad():
        for phase, lengths, run in phases:
            for dtype in plan.dtypes:
                for length in lengths:
                    started(f"{phase}, {dtype}, {plots.short(length)} tokens")
                    rows += cells.get((phase, dtype, length), partial(run, plan, dtype, length))
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


def lines_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for people: settings only where there are several."""
    several = len({row["settings"] for row in rows}) > 1
    lines = []
    for row in rows:
        what = {key: row[key] for key in ("phase", "dtype", "length", *(("settings",) if several else ()))}
        times = {key: row[key] if row[key] < 1000 else round(row[key]) for key in ("hip_ms", "sdpa_ms")}
        runs = f"{row['runs']}, {row['sdpa_runs']}"
        lines.append({**what, **times, "times_faster": row["times_faster"], "path": row["path"], "runs": runs})
    return lines


def print_reasons(rows: list[dict[str, Any]]) -> None:
    """Why some of the paths were dense."""
    reasons = dict.fromkeys(f"{row['phase'].split()[0]} at {row['length']}: {row['reason']}" for row in rows if row["reason"])
    for reason in reasons:
        print(f"dense {reason}")


def print_fit(fit: dict[str, Any]) -> None:
    if fit["hip"] is not None:
        over = f"{plots.short(fit['lengths'][0])} to {plots.short(fit['lengths'][-1])}"
        growth = f"hip grows as T^{fit['hip']:.2f}, SDPA as T^{fit['sdpa']:.2f}"
        print(f"prefill, {fit['dtype']}, {fit['settings']}, {over}: {growth}")


def draw(document: dict[str, Any], file: Path) -> None:
    """The ratio against the length: prefill and decode side by side, a line per dtype and setting."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in document["rows"]:
        panel, _, how = row["phase"].partition(" ")
        label = " ".join(part for part in (row["dtype"], row["settings"], how) if part)
        panels.setdefault(panel, {}).setdefault(label, []).append((row["length"], row["times_faster"]))
    conditions = document["title"].removeprefix(TITLE)
    plots.ratios(file, f"One attention call, hip against scaled_dot_product_attention\n{conditions}", panels)


def parse_choice(text: str, allowed: Sequence[str], option: str) -> list[str]:
    """A comma list of the names in `allowed`."""
    chosen = [part.strip() for part in text.split(",")]
    for name in chosen:
        if name not in allowed:
            raise typer.BadParameter(f"got {name!r}, allowed: {', '.join(allowed)}", param_hint=option)
    return chosen


def main(
    lengths: Annotated[str | None, typer.Option(help="Comma list such as 8K,32K. Default: 1K to 128K; decode from 8K.")] = None,
    phases: Annotated[str, typer.Option(help="prefill, decode or both.")] = "prefill,decode",
    dtypes: Annotated[str, typer.Option(help="Of bf16, fp32, fp16.")] = "bf16,fp32",
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["defaults"],  # noqa: B006
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key heads.", min=1)] = 2,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each call; slow ones get fewer.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Of the random tensors.", min=0)] = 0,
    output: Output = None,
    plot: Plot = None,
    report_file: Report = None,
    as_json: Json = False,
) -> None:
    """Time one attention call against PyTorch's scaled_dot_product_attention, in prefill and in decode."""
    if heads % kv_heads:
        raise typer.BadParameter(f"got {heads} query heads, allowed: a multiple of {kv_heads} key heads", param_hint="--heads")
    wanted = parse_choice(phases, ("prefill", "decode"), "--phases")
    try:
        given = None if lengths is None else sizes(lengths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--lengths") from None
    try:
        plan = Plan(
            prefill=(given or PREFILL_LENGTHS) if "prefill" in wanted else (),
            decode=(given or DECODE_LENGTHS) if "decode" in wanted else (),
            dtypes=parse_choice(dtypes, tuple(DTYPES), "--dtypes"),
            settings=settings_of(settings, base={}),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            repeats=repeats,
            seed=seed,
        )
        refuse_extension(plan.settings)
        configs = {name: config.to_dict() for name, config in plan.settings.items()}
        targets = Targets(as_json, output, plot, report_file)
        shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, repeats=repeats, seed=seed)
        cells = targets.cells("latency", configs=configs, **shape)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with cells, report.progress() as bar:
        task = bar.add_task("", total=len(plan.dtypes) * (len(plan.prefill) + len(plan.decode)))
        todo = iter(range(bar.tasks[0].total))
        rows = measure(plan, cells, lambda what: bar.update(task, description=what, completed=next(todo)))
    fits = exponents(rows)
    title = f"{TITLE}{plan.conditions}"
    details = {"exponents": fits, "configs": configs}
    targets.publish(Results("latency", title, rows, details, draw), cells, {title: lines_of(rows)})
    if not as_json:
        print_reasons(rows)
        for fit in fits:
            print_fit(fit)
