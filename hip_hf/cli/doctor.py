"""The command `hip-hf doctor`, which a user runs first: its options, and how its result is
published."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from typer import Option

from hip_hf.cli import latency
from hip_hf.cli.inputs import user_errors
from hip_hf.cli.presets import parse_choice, sizes
from hip_hf.cli.publish import Json, Output, Targets
from hip_hf.eval.measure import doctor
from hip_hf.eval.measure.latency import TIMED_DTYPES
from hip_hf.shown import said

# Tokens of the timed calls.
LENGTH = {"cuda": 32768, "cpu": 8192}
DEVICE = Option(help="cuda or cpu. Default: cuda where PyTorch sees a GPU.")
DTYPES = Option(help="Of bf16, fp16, fp32. Default: all; on a CPU bf16,fp32.")
TOKENS = Option(help="Tokens of the timed calls, such as 16K. Default: 32K; on a CPU 8K.")


def main(
    device: Annotated[str | None, DEVICE] = None,
    dtypes: Annotated[str | None, DTYPES] = None,
    length: Annotated[str | None, TOKENS] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Try every kernel on this machine: what works, how fast, and what to set if something does
    not. Exit 1 if so."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    latency.check_kind(device)
    default = "bf16,fp16,fp32" if device == "cuda" else "bf16,fp32"
    kinds = parse_choice(dtypes or default, tuple(TIMED_DTYPES), "--dtypes")
    with user_errors():
        tokens = LENGTH[device] if length is None else sizes(length)[0]
        targets = Targets(as_json, output)
    on = torch.device(device)
    if device == "cuda":
        on = torch.device(device, torch.cuda.current_device())
    missing = doctor.missing_for(on)
    rows = [doctor.check_row(label, found) for label, found in doctor.tried(on, kinds, not missing)]
    about, speed = doctor.facts(on, missing), []
    try:
        speed = doctor.timed(on, kinds[0], tokens)
    except Exception as error:  # of a bad kernel: what was found so far must be seen
        about["timings"] = f"none: {said(error)}"
    failed = [row for row in rows if row["problem"]]
    title = f"doctor: {len(rows)} checks, {len(failed)} failed"
    heads = "{heads} query heads, {kv_heads} key heads".format(**doctor.SHAPE[device])
    what = f"one attention call of {tokens} tokens, sparse at any length, against PyTorch's"
    names = rows[0] if rows else ()
    shown = [name for name in names if failed or name not in ("problem", "instead")]
    tables = {
        "machine": [{"what": name, "is": value} for name, value in about.items()],
        title: [{name: row[name] for name in shown} for row in rows],
        f"{what}, {heads}": latency.lines_of(speed, whole=device == "cuda"),
    }
    details = dict(about=about, failed=len(failed), speed=speed)
    targets.publish("doctor", title, rows, details, tables=tables)
    if failed or "timings" in about:
        raise typer.Exit(1)
