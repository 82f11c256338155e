"""The command `hip-hf latency`: its options, and how its result is published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer

from hip_hf.backends.triton import trust
from hip_hf.cli.inputs import user_errors
from hip_hf.cli.presets import HELP, parse_choice, refuse_extension, settings_of, sizes
from hip_hf.cli.publish import Json, Output, Plot, ReportFile, Targets
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import latency
from hip_hf.eval.reporting import plots
from hip_hf.eval.reporting.pictures import LATENCY_TITLE


def lines_of(rows: list[dict[str, Any]], whole: bool = False) -> list[dict[str, Any]]:
    """The rows for people, or the `whole` of them: settings only where there are several."""
    several = len({row["settings"] for row in rows}) > 1
    lines = []
    for row in rows:
        if whole:
            lines.append(
                {
                    key: value
                    for key, value in row.items()
                    if key != "reason" and (several or key != "settings")
                }
            )
            continue
        what = {
            key: row[key]
            for key in ("phase", "dtype", "length", *(("settings",) if several else ()))
        }
        times = {
            key: row[key] if row[key] < 1000 else round(row[key]) for key in ("hip_ms", "sdpa_ms")
        }
        runs = f"{row['runs']}, {row['sdpa_runs']}"
        lines.append(
            {
                **what,
                **times,
                "times_faster": row["times_faster"],
                "path": row["path"],
                "runs": runs,
            }
        )
    return lines


def main(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma list such as 8K,1M. Default: 1K to 128K, decode from 8K; on a GPU 8K to 1M."
        ),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="prefill, decode; on a GPU also launched (decode without graphs), backward, selection."
        ),
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Of bf16, fp32, fp16. Default: bf16,fp32; on a GPU bf16.")
    ] = None,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["defaults"],  # noqa: B006
    heads: Annotated[
        int | None, typer.Option(help="Query heads. Default: 8; on a GPU 32.", min=1)
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key heads. Default: 2; on a GPU 8.", min=1)
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[
        int, typer.Option(help="Runs of each call; slow ones get fewer.", min=1)
    ] = 5,
    seed: Annotated[int, typer.Option(help="Of the random tensors.", min=0)] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: the kernels against FlashAttention and cuDNN.")
    ] = "cpu",
    output: Output = None,
    plot: Plot = None,
    report_file: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Time one attention call against PyTorch's scaled_dot_product_attention, in prefill and in
    decode."""
    parse_choice(device, ("cpu", "cuda"), "--device")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise typer.BadParameter(
            "got 'cuda', allowed here: cpu (torch sees no GPU)", param_hint="--device"
        )
    if gpu and (why := trust.lacking(torch.device(device))):
        raise typer.BadParameter(f"got 'cuda', allowed here: cpu ({why})", param_hint="--device")
    heads, kv_heads = heads or (32 if gpu else 8), kv_heads or (8 if gpu else 2)
    if heads % kv_heads:
        raise typer.BadParameter(
            f"got {heads} query heads, allowed: a multiple of {kv_heads} key heads",
            param_hint="--heads",
        )
    known = (
        ("prefill", "decode", "launched", "backward", "selection") if gpu else ("prefill", "decode")
    )
    wanted = parse_choice(phases or ",".join(known), known, "--phases")
    with user_errors("--lengths"):
        given = None if lengths is None else sizes(lengths)
    with user_errors():
        plan = latency.TimingPlan(
            prefill=(given or latency.PREFILL_LENGTHS) if "prefill" in wanted else (),
            decode=(given or latency.DECODE_LENGTHS) if "decode" in wanted else (),
            dtypes=parse_choice(
                dtypes or ("bf16" if gpu else "bf16,fp32"), tuple(latency.TIMED_DTYPES), "--dtypes"
            ),
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
        shape = dict(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            repeats=repeats,
            seed=seed,
            device=device,
        )
        kept = targets.kept("latency", configs=configs, **shape)
    extra: dict[str, Any]
    with kept:
        if gpu:
            from hip_hf.eval.measure import gpu_latency

            check_timed(plan.settings)
            counts = given or gpu_latency.GPU_LENGTHS
            rows, refused = gpu_latency.measure(plan, wanted, counts, kept)
            extra = {"refused": refused}
        else:
            rows = latency.measure(plan, kept)
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


def check_timed(settings: Mapping[str, HiPConfig]) -> None:
    """Raise typer.BadParameter for what is not timed on a GPU: other methods have no kernels."""
    from hip_hf.eval.measure import gpu_latency

    for config in settings.values():
        if config.method not in gpu_latency.TIMED_METHODS or config.delta is not None:
            what = config.method if config.delta is None else "Delta correction"
            allowed = f"{', '.join(gpu_latency.TIMED_METHODS)}, without Delta correction, which is not timed"
            raise typer.BadParameter(
                f"got {what!r}, allowed on a GPU: {allowed}", param_hint="--settings"
            )
