"""`hip-hf latency`: what one attention call takes, against PyTorch's own attention on the same tensors.

Every figure is a median of interleaved runs (PyTorch's, then each of the settings, and again), so that a busy machine
slows both sides alike. Queries, keys and values are seeded standard normal noise: the cost of the sparse path does not
depend on what is in them. What the attention is worth on real text is for `fidelity` and `passkey` to say.

Prefill is one causal call over the whole context. Decode is one token against a cache, once *amortised* over steps that share
selections as they do in generation, once *refreshed*, with a selection of its own for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from hip_hf.backends.triton import trust
from hip_hf.eval.measure.timing import (
    AMORTISED,
    DECODE_LENGTHS,
    DTYPES,
    PREFILL,
    PREFILL_LENGTHS,
    REFRESHED,
    Call,
    Plan,
    Steps,
    interleave,
    ours,
    refresh_period,
    sdpa,
)
from hip_hf.eval.reporting import plots, report
from hip_hf.eval.reporting.presets import HELP, parse_choice, refuse_extension, settings_of, sizes
from hip_hf.eval.reporting.publish import Json, Output, Plot, Report, Results, Targets
from hip_hf.eval.reporting.resumable import Cells

TITLE = "latency: "
FIT_RANGE = (16384, 131072)


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
    counts = [lcm(refresh_period(config), config.block_k) for _, _, config in variants]
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


def lines_of(rows: list[dict[str, Any]], whole: bool = False) -> list[dict[str, Any]]:
    """The rows for people, or the `whole` of them: settings only where there are several."""
    several = len({row["settings"] for row in rows}) > 1
    lines = []
    for row in rows:
        if whole:
            lines.append({key: value for key, value in row.items() if key != "reason" and (several or key != "settings")})
            continue
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
        if not row["times_faster"]:
            continue  # selection alone has no counterpart
        panel, _, how = row["phase"].partition(" ")
        label = " ".join(part for part in (row["dtype"], row["settings"], how) if part)
        panels.setdefault(panel, {}).setdefault(label, []).append((row["length"], row["times_faster"]))
    conditions = document["title"].removeprefix(TITLE)
    plots.ratios(file, f"One attention call, hip against scaled_dot_product_attention\n{conditions}", panels)


def main(
    lengths: Annotated[
        str | None, typer.Option(help="Comma list such as 8K,1M. Default: 1K to 128K, decode from 8K; on a GPU 8K to 1M.")
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="prefill, decode; on a GPU also launched (decode without graphs), backward, selection.")
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help="Of bf16, fp32, fp16. Default: bf16,fp32; on a GPU bf16.")] = None,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["defaults"],  # noqa: B006
    heads: Annotated[int | None, typer.Option(help="Query heads. Default: 8; on a GPU 32.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads. Default: 2; on a GPU 8.", min=1)] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each call; slow ones get fewer.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Of the random tensors.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: the kernels against FlashAttention and cuDNN.")] = "cpu",
    output: Output = None,
    plot: Plot = None,
    report_file: Report = None,
    as_json: Json = False,
) -> None:
    """Time one attention call against PyTorch's scaled_dot_product_attention, in prefill and in decode."""
    parse_choice(device, ("cpu", "cuda"), "--device")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise typer.BadParameter("got 'cuda', allowed here: cpu (torch sees no GPU)", param_hint="--device")
    if gpu and (why := trust.lacking(torch.device(device))):
        raise typer.BadParameter(f"got 'cuda', allowed here: cpu ({why})", param_hint="--device")
    heads, kv_heads = heads or (32 if gpu else 8), kv_heads or (8 if gpu else 2)
    if heads % kv_heads:
        raise typer.BadParameter(f"got {heads} query heads, allowed: a multiple of {kv_heads} key heads", param_hint="--heads")
    known = ("prefill", "decode", "launched", "backward", "selection") if gpu else ("prefill", "decode")
    wanted = parse_choice(phases or ",".join(known), known, "--phases")
    try:
        given = None if lengths is None else sizes(lengths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--lengths") from None
    try:
        plan = Plan(
            prefill=(given or PREFILL_LENGTHS) if "prefill" in wanted else (),
            decode=(given or DECODE_LENGTHS) if "decode" in wanted else (),
            dtypes=parse_choice(dtypes or ("bf16" if gpu else "bf16,fp32"), tuple(DTYPES), "--dtypes"),
            settings=settings_of(settings, base={}),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            repeats=repeats,
            seed=seed,
            device=torch.device(device),
        )
        refuse_extension(plan.settings)
        configs = {name: config.to_dict() for name, config in plan.settings.items()}
        targets = Targets(as_json, output, plot, report_file)
        shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, repeats=repeats, seed=seed, device=device)
        cells = targets.cells("latency", configs=configs, **shape)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with cells:
        if gpu:
            rows, extra = on_gpu(plan, wanted, given, cells)
        else:
            with report.progress() as bar:
                task = bar.add_task("", total=len(plan.dtypes) * (len(plan.prefill) + len(plan.decode)))
                todo = iter(range(bar.tasks[0].total))
                rows = measure(plan, cells, lambda what: bar.update(task, description=what, completed=next(todo)))
            extra = {"exponents": exponents(rows)}
    title = f"{TITLE}{plan.conditions}"
    targets.publish(Results("latency", title, rows, {**extra, "configs": configs}, draw), cells, {title: lines_of(rows, gpu)})
    if as_json:
        return
    print_reasons(rows)
    for fit in extra.get("exponents", ()):
        print_fit(fit)
    for line in extra.get("refused", ()):
        print(line)


def on_gpu(
    plan: Plan, phases: Sequence[str], lengths: Sequence[int] | None, cells: Cells
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `gpu_latency`, and what PyTorch's backends refused."""
    from hip_hf.eval import gpu_latency

    gpu_latency.check(plan.settings)
    with report.progress() as bar:
        task = bar.add_task("", total=None)
        rows, refused = gpu_latency.measure(
            plan, phases, lengths or gpu_latency.LENGTHS, lambda what: bar.update(task, description=what), cells
        )
    return rows, {"refused": refused}
