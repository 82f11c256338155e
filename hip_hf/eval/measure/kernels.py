"""What every GPU kernel would spend on every GPU, without having one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from hip_hf.backends.triton import trust
from hip_hf.eval.reporting.report import grouped
from hip_hf.eval.reporting.resumable import Resumable, Rows

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")
COMPILED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Key = tuple[Any, ...]


def why_not() -> str:
    """Why nothing can be compiled here; empty if it can."""
    if why := trust.old_triton():
        return f"{why}."
    from triton.runtime import JITFunction

    from hip_hf.backends.triton.selection.topk import threshold

    if not isinstance(threshold, JITFunction):
        return "Triton interprets instead of compiling (TRITON_INTERPRET is set): unset it."
    return ""


def all_launches(
    targets: Sequence[str], dims: Sequence[int], dtypes: Sequence[str], only: str
) -> list[tuple[Any, ...]]:
    """Launch, target, head dim and dtype of everything to compile: the kernels that have `only` in
    their name."""
    from hip_hf.backends.triton.compile import catalogue

    return [
        (launch, target, dim, COMPILED_DTYPES[kind])
        for target in targets
        for dim in dims
        for kind in dtypes
        for launch in catalogue.launches_of(dim, COMPILED_DTYPES[kind], target)
        if only in launch.name
    ]


def kernel_rows(
    work: Sequence[Key], before: dict[Key, dict[str, Any]], spills: int, kept: Resumable
) -> Rows:
    """A row for each of the launches in `work`: from `kept`, from `before` (see `compiled_before`),
    or compiled now."""
    from hip_hf.backends.triton.compile import budget

    columns = {field.name for field in fields(budget.Spent)}
    # others were told less of themselves, or were allowed more
    before = {
        key: row
        for key, row in before.items()
        if row.keys() == columns and row["spilled"] <= spills
    }
    kept.expect("compiling", len(work))
    rows = []
    for launch, target, dim, dtype in work:
        # what was compiled before counts only while code and launch configuration are the same
        kind = str(dtype).removeprefix("torch.")
        key = (launch.name, target, dim, kind, launch.code(), launch.digest())
        spend = partial(budget.spend, launch, target, dim, dtype, spills)
        rows.append(kept.get(key, partial(before.get, key) if key in before else spend))
    return rows


def compiled_before(output: Path | None, version: str) -> dict[Key, dict[str, Any]]:
    """Rows without a problem in an earlier `output` of this command with the same Triton, by what
    they were compiled from. Raises ValueError if the file is there, and this command has not
    written it."""
    if output is None or not output.exists():
        return {}
    names = ("kernel", "target", "dim", "dtype", "code", "launch")
    try:
        document = json.loads(output.read_text(encoding="utf-8"))
        sound = [row for row in document["rows"] if not row["problem"]]
        found = {tuple(row[name] for name in names): row for row in sound}
        return found if document["triton"] == version else {}
    except (OSError, ValueError, KeyError, TypeError):
        got = f"{str(output)!r}, which is no result of this command"
        allowed = "what hip-hf kernels --output has written, or a file that is not there"
        raise ValueError(f"--output: got {got}, allowed: {allowed}") from None


def summary(rows: Iterable[dict[str, Any]]) -> Rows:
    """Of each kernel and target the most that it spends, over head dims and dtypes; shared memory
    in KB."""
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
        for (kernel, target), some in grouped(rows, itemgetter("kernel", "target")).items()
    ]
