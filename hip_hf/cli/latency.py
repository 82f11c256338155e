"""The command `hip-hf latency`: its options, and how its result is published."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
import typer
from typer import Option

from hip_hf.backends.triton import trust
from hip_hf.cli.inputs import not_allowed, user_errors
from hip_hf.cli.presets import Settings, parse_choice, refuse_extension, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import latency
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.pictures import LATENCY_TITLE

_LENGTHS = "Comma list such as 8K,1M. Default: 1K to 128K, decode from 8K; on a GPU 8K to 1M."
_PHASES = "prefill, decode; on a GPU also launched (decode without graphs), backward, selection."
_DTYPES = "Of bf16, fp32, fp16. Default: bf16,fp32; on a GPU bf16."
HEADS = Option(help="Query heads. Default: 8; on a GPU 32.", min=1)
KV_HEADS = Option(help="Key heads. Default: 2; on a GPU 8.", min=1)
DEVICE = Option(help="cpu, or cuda: the kernels against FlashAttention and cuDNN.")
# What is timed, on a CPU and beyond that on a GPU.
PHASES, GPU_PHASES = ("prefill", "decode"), ("launched", "backward", "selection")


def lines_of(rows: list[dict[str, Any]], whole: bool = False) -> list[dict[str, Any]]:
    """The rows for people, or the `whole` of them: settings only where there are several."""
    hidden = {"reason"} if len({row["settings"] for row in rows}) > 1 else {"reason", "settings"}
    if whole:
        return [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    lines = []
    for row in rows:
        names = ("phase", "dtype", "length", "settings")
        line = {name: row[name] for name in names if name not in hidden}
        for name in ("hip_ms", "sdpa_ms"):
            line[name] = row[name] if row[name] < 1000 else round(row[name])
        line |= {name: row[name] for name in ("times_faster", "path")}
        lines.append({**line, "runs": f"{row['runs']}, {row['sdpa_runs']}"})
    return lines


def check_kind(device: str, lacking: str = "") -> None:
    """One line for a device that is neither `cpu` nor `cuda`, or for a GPU that torch does not see
    or that is `lacking` something."""
    parse_choice(device, ("cpu", "cuda"), "--device")
    why = lacking if torch.cuda.is_available() else "torch sees no GPU"
    if device == "cuda" and why:
        raise typer.BadParameter(f"got 'cuda', allowed here: cpu ({why})", param_hint="--device")


def main(
    lengths: Annotated[str | None, Option(help=_LENGTHS)] = None,
    phases: Annotated[str | None, Option(help=_PHASES)] = None,
    dtypes: Annotated[str | None, Option(help=_DTYPES)] = None,
    settings: Settings = ["defaults"],  # noqa: B006
    heads: Annotated[int | None, HEADS] = None,
    kv_heads: Annotated[int | None, KV_HEADS] = None,
    head_dim: Annotated[int, Option(min=1)] = 128,
    repeats: Annotated[int, Option(help="Runs of each call; slow ones get fewer.", min=1)] = 5,
    seed: Annotated[int, Option(help="Of the random tensors.", min=0)] = 0,
    device: Annotated[str, DEVICE] = "cpu",
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Time one attention call against PyTorch's scaled_dot_product_attention, in prefill and in
    decode."""
    check_kind(device)
    gpu = device == "cuda"
    if gpu:
        check_kind(device, trust.lacking(torch.device(device)))
    heads, kv_heads = heads or (32 if gpu else 8), kv_heads or (8 if gpu else 2)
    if heads % kv_heads:
        line = f"got {heads} query heads, allowed: a multiple of {kv_heads} key heads"
        raise typer.BadParameter(line, param_hint="--heads")
    known = (*PHASES, *GPU_PHASES) if gpu else PHASES
    wanted = parse_choice(phases or ",".join(known), known, "--phases")
    kinds = dtypes or ("bf16" if gpu else "bf16,fp32")
    with user_errors("--lengths"):
        given = None if lengths is None else sizes(lengths)
    with user_errors():
        shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, repeats=repeats, seed=seed)
        plan = latency.TimingPlan(
            prefill=(given or latency.PREFILL_LENGTHS) if "prefill" in wanted else (),
            decode=(given or latency.DECODE_LENGTHS) if "decode" in wanted else (),
            dtypes=parse_choice(kinds, tuple(latency.TIMED_DTYPES), "--dtypes"),
            settings=settings_of(settings, base={}),
            device=torch.device(device),
            **shape,
        )
        refuse_extension(plan.settings)
        configs = {name: config.to_dict() for name, config in plan.settings.items()}
        targets = Targets(as_json, output, plot, report_file)
        kept = targets.kept("latency", configs=configs, **shape, device=device)
    extra: dict[str, Any]
    with kept:
        if gpu:
            from hip_hf.eval.measure import gpu_latency

            check_timed(plan.settings.values())
            counts = given or gpu_latency.GPU_LENGTHS
            rows, refused = gpu_latency.gpu_latency_rows(plan, wanted, counts, kept)
            extra = {"refused": refused}
        else:
            rows = latency.latency_rows(plan, kept)
            extra = {"exponents": latency.exponents(rows)}
    title, details = f"{LATENCY_TITLE}{plan.conditions}", {**extra, "configs": configs}
    targets.publish("latency", title, rows, details, kept, {title: lines_of(rows, gpu)})
    if as_json:
        return
    dense = [row for row in rows if row["reason"]]
    lines = [f"dense {x['phase'].split()[0]} at {x['length']}: {x['reason']}" for x in dense]
    for fit in extra.get("exponents", ()):
        if fit["hip"] is not None:
            over = f"{plots.short(fit['lengths'][0])} to {plots.short(fit['lengths'][-1])}"
            growth = f"hip grows as T^{fit['hip']:.2f}, SDPA as T^{fit['sdpa']:.2f}"
            lines.append(f"prefill, {fit['dtype']}, {fit['settings']}, {over}: {growth}")
    for line in dict.fromkeys(lines + extra.get("refused", [])):
        print(line)


def check_timed(settings: Iterable[HiPConfig]) -> None:
    """Raise typer.BadParameter for what is not timed on a GPU: other methods have no kernels."""
    from hip_hf.eval.measure.gpu_latency import TIMED_METHODS

    for config in settings:
        if config.method not in TIMED_METHODS or config.delta is not None:
            what = config.method if config.delta is None else "Delta correction"
            methods = f"on a GPU {', '.join(TIMED_METHODS)}"
            allowed = f"{methods}, without Delta correction, which is not timed"
            raise not_allowed("--settings", what, allowed)
