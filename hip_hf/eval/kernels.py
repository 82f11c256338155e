"""`hip-hf kernels`: what every GPU kernel would spend on every GPU, without having one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.backends.triton import trust
from hip_hf.eval.reporting import report
from hip_hf.eval.reporting.presets import parse_choice
from hip_hf.eval.reporting.publish import Json, Output, Results, Targets

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(
    targets: Annotated[str, typer.Option(help=f"Of {', '.join(TARGETS)}.")] = ",".join(TARGETS),
    dims: Annotated[str, typer.Option(help="Head dims.")] = "64,128,256",
    dtypes: Annotated[str, typer.Option(help="Of bf16, fp16.")] = "bf16,fp16",
    only: Annotated[str, typer.Option(help="Only kernels with this in their name.")] = "",
    spills: Annotated[int, typer.Option(min=0, help="Bytes of stack (AMD: registers) that a kernel may spill.")] = 0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel for every GPU. Exit 1 if one spills, does not fit, or misses the tensor cores it should use.

    Also if these wait for each of their instructions or a program touches what they work on, or if a kernel has several stages
    and fetches nothing ahead. What --output holds is kept where code, launch and Triton are the same."""
    chosen = parse_choice(targets, TARGETS, "--targets")
    numbers = [int(dim) if dim.isdecimal() else 0 for dim in dims.split(",")]
    if not all(numbers):
        raise typer.BadParameter(f"got {dims!r}, allowed: positive integers, separated by commas", param_hint="--dims")
    kinds = parse_choice(dtypes, tuple(DTYPES), "--dtypes")
    if why := trust.old_triton():
        report.notes.print(f"{why}.")
        raise typer.Exit(1)
    import triton
    from triton.runtime import JITFunction

    from hip_hf.backends.triton.compile import budget, catalogue
    from hip_hf.backends.triton.selection.topk import threshold

    if not isinstance(threshold, JITFunction):
        report.notes.print("Triton interprets instead of compiling (TRITON_INTERPRET is set): unset it.")
        raise typer.Exit(1)
    work = [
        (launch, target, dim, DTYPES[kind])
        for target in chosen
        for dim in numbers
        for kind in kinds
        for launch in catalogue.launches_of(dim, DTYPES[kind], target)
        if only in launch.name
    ]
    asked = dict(targets=chosen, dims=numbers, dtypes=kinds, only=only, spills=spills, triton=triton.__version__)
    try:
        sink = Targets(as_json, output)
        before, cells = compiled_before(output, triton.__version__), sink.cells("kernels", **asked)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    columns = {field.name for field in fields(budget.Spent)}
    # others were told less of themselves, or were allowed more
    before = {key: row for key, row in before.items() if row.keys() == columns and row["spilled"] <= spills}
    rows = []
    with cells, report.progress() as progress:
        for launch, target, dim, dtype in progress.track(work, description="compiling"):
            # what was compiled before counts only while code and launch configuration are the same
            key = (launch.name, target, dim, str(dtype).removeprefix("torch."), launch.code(), launch.digest())
            rows.append(cells.get(key, partial(known_or_compiled, before.get(key), launch, target, dim, dtype, spills)))
    failed = [row for row in rows if row["problem"]]
    details = dict(failed=len(failed), **asked)
    title = f"kernels: {len(rows)} compiled with Triton {triton.__version__}, {len(failed)} with a problem"
    tables = {title: summary(rows), **({"problems": failed} if failed else {})}
    sink.publish(Results("kernels", title, rows, details), cells, tables)
    if failed or not rows:
        raise typer.Exit(1)


def known_or_compiled(known: dict[str, Any] | None, *what: Any) -> dict[str, Any]:
    """The row of a launch. `what`: what `budget.spend` is given."""
    from hip_hf.backends.triton.compile import budget

    return known or asdict(budget.spend(*what))


def compiled_before(output: Path | None, version: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows without a problem in an earlier `output` of this command with the same Triton, by what they were compiled from.

    Raises:
        ValueError: the file is there, and this command has not written it.
    """
    if output is None or not output.exists():
        return {}
    names = ("kernel", "target", "dim", "dtype", "code", "launch")
    try:
        document = json.loads(output.read_text(encoding="utf-8"))
        found = {tuple(row[name] for name in names): row for row in document["rows"] if not row["problem"]}
        return found if document["triton"] == version else {}
    except (OSError, ValueError, KeyError, TypeError):
        allowed = "what hip-hf kernels --output has written, or a file that is not there"
        raise ValueError(f"--output: got {str(output)!r}, which is no result of this command, allowed: {allowed}") from None


def _grouped(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["target"]), []).append(row)
    return found


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel and target the most that it spends, over head dims and dtypes; shared memory in KB."""
    return [
        dict(
            kernel=kernel,
            target=target,
            compiled=len(some),
            registers=max(row["registers"] for row in some),
            shared=max(row["shared"] for row in some) / 1024,
            spilled=max(row["spilled"] for row in some),
            path=" | ".join(dict.fromkeys(row["path"] for row in some if row["path"])),
            problem="; ".join(dict.fromkeys(row["problem"] for row in some if row["problem"])),
        )
        for (kernel, target), some in _grouped(rows).items()
    ]
