"""The command `hip-hf kernels`: its options, and how its result is published."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from hip_hf.cli.inputs import not_allowed, user_errors
from hip_hf.cli.presets import parse_choice
from hip_hf.cli.publish import Json, Output, Targets
from hip_hf.eval.measure import kernels
from hip_hf.eval.measure.kernels import COMPILED_DTYPES, TARGETS
from hip_hf.eval.reporting import report

SPILLS = Option(min=0, help="Bytes of stack (AMD: registers) that a kernel may spill.")


def main(
    targets: Annotated[str, Option(help=f"Of {', '.join(TARGETS)}.")] = ",".join(TARGETS),
    dims: Annotated[str, Option(help="Head dims.")] = "64,128,256",
    dtypes: Annotated[str, Option(help="Of bf16, fp16.")] = "bf16,fp16",
    only: Annotated[str, Option(help="Only kernels with this in their name.")] = "",
    spills: Annotated[int, SPILLS] = 0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel for every GPU. Exit 1 if one spills, does not fit, or misses the tensor
    cores it should use.

    Also if these wait for each of their instructions or a program touches what they work on, or if
    a kernel has several stages and fetches nothing ahead. What --output holds is kept where code,
    launch and Triton are the same."""
    chosen = parse_choice(targets, TARGETS, "--targets")
    numbers = [int(dim) if dim.isdecimal() else 0 for dim in dims.split(",")]
    if not all(numbers):
        raise not_allowed("--dims", dims, "positive integers, separated by commas")
    kinds = parse_choice(dtypes, tuple(COMPILED_DTYPES), "--dtypes")
    if why := kernels.why_not():
        report.notes.print(why)
        raise typer.Exit(1)
    import triton

    work = kernels.all_launches(chosen, numbers, kinds, only)
    asked = dict(targets=chosen, dims=numbers, dtypes=kinds, only=only, spills=spills)
    asked |= dict(triton=triton.__version__)
    with user_errors():
        sink = Targets(as_json, output)
        before = kernels.compiled_before(output, triton.__version__)
        kept = sink.kept("kernels", **asked)
    with kept:
        rows = kernels.kernel_rows(work, before, spills, kept)
    failed = [row for row in rows if row["problem"]]
    details = dict(failed=len(failed), **asked)
    compiled = f"{len(rows)} compiled with Triton {triton.__version__}"
    title = f"kernels: {compiled}, {len(failed)} with a problem"
    tables = {title: kernels.summary(rows), **({"problems": failed} if failed else {})}
    sink.publish("kernels", title, rows, details, kept, tables)
    if failed or not rows:
        raise typer.Exit(1)
