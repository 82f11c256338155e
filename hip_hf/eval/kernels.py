"""`hip-hf kernels`: what every GPU kernel would spend on every GPU, without having one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer

from hip_hf.eval import report

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _choice(name: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    for value in chosen:
        if value not in allowed:
            raise typer.BadParameter(f"got {value!r}, allowed: {', '.join(allowed)}", param_hint=name)
    return chosen


def main(
    targets: Annotated[str, typer.Option(help=f"Of {', '.join(TARGETS)}.")] = ",".join(TARGETS),
    dims: Annotated[str, typer.Option(help="Head dims.")] = "64,128,256",
    dtypes: Annotated[str, typer.Option(help="Of bf16, fp16.")] = "bf16,fp16",
    only: Annotated[str, typer.Option(help="Only kernels with this in their name.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """Compile every kernel for every GPU. Exit 1 if one spills, does not fit, or misses the tensor cores it should use."""
    chosen = _choice("--targets", targets, TARGETS)
    numbers = [int(dim) if dim.isdecimal() else 0 for dim in dims.split(",")]
    if not all(numbers):
        raise typer.BadParameter(f"got {dims!r}, allowed: positive integers, separated by commas", param_hint="--dims")
    kinds = _choice("--dtypes", dtypes, tuple(DTYPES))
    try:
        import triton
        from triton.runtime import JITFunction

        from hip_hf.kernels import budget
        from hip_hf.kernels.topk import threshold
    except ImportError as error:
        report.notes.print(f"Triton cannot be imported: {error}")
        raise typer.Exit(1) from None
    if not isinstance(threshold, JITFunction):
        report.notes.print("Triton interprets instead of compiling (TRITON_INTERPRET is set): unset it.")
        raise typer.Exit(1)
    work = [
        (launch, target, dim, DTYPES[kind])
        for target in chosen
        for dim in numbers
        for kind in kinds
        for launch in budget.launches_of(dim, DTYPES[kind], target)
        if only in launch.name
    ]
    rows = []
    with report.progress() as progress:
        for item in progress.track(work, description="compiling"):
            rows.append(budget.spend(*item))
    failed = [row for row in rows if row.problem]
    report.show("kernels", [asdict(row) for row in rows], as_json, failed=len(failed), triton=triton.__version__)
    if failed or not rows:
        raise typer.Exit(1)
