"""Batches whose sequences differ: each is computed as it would be alone, so that no result depends
on what else is in the batch.

Whether a call goes dense depends on the length of a context, and whether it is a decode step on the
number of query rows. Padded batches hold sequences of many lengths: those that go the same way are
one *part*, and each part is an attention problem of its own. Nearly all calls are one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from hip_hf.backends.base import Result
from hip_hf.backends.keys_read import all_keys, total_count
from hip_hf.geometry import DECODE_ROWS, BlockMask, Span
from hip_hf.problem import AttentionProblem


@dataclass(frozen=True)
class CallPart:
    """Sequences of a batch that go the same way. `problem` has all batch rows, of the query rows
    those from `first` on; `reason`: why they are dense, of the longest of them, or an empty string;
    `unsupported`: whether for want of support."""

    problem: AttentionProblem
    first: int
    reason: str
    unsupported: bool


def split_call(
    problem: AttentionProblem, reason_of: Callable[[AttentionProblem], tuple[str, bool]]
) -> list[CallPart]:
    """The parts of a call, the sparse ones first: these may start a state afresh, and the dense
    ones only move it on.

    `reason_of`: why a problem must be dense, or an empty string; and whether for want of support.
    """
    most = problem.q.shape[2]
    if len(problem.spans) == 1 and (most <= DECODE_ROWS or problem.spans[0].rows > DECODE_ROWS):
        return [CallPart(problem, 0, *reason_of(problem))]
    known: dict[tuple[int, int, tuple[int, int]], tuple[str, bool]] = {}
    found: dict[tuple[int, int] | None, list[tuple[Span, tuple[str, bool]]]] = {}
    for span in problem.spans:
        # a step of a few rows, in a call that has more of them for other sequences
        few = span.rows <= DECODE_ROWS < most
        rows = (span.row_start, span.row_end) if few else (0, most)
        like = span.end, span.rows, rows
        if like not in known:
            known[like] = reason_of(_cut(problem, (span,), *rows))
        why = known[like]
        found.setdefault(None if why[0] else rows, []).append((span, why))
    parts = []
    for of, members in sorted(found.items(), key=lambda item: item[0] is None):
        first, end = of or (0, most)
        spans = tuple(span for span, _ in members)
        _, why = max(members, key=lambda member: member[0].end)
        parts.append(CallPart(_cut(problem, spans, first, end), first, *why))
    return parts


def _cut(
    problem: AttentionProblem, spans: tuple[Span, ...], first: int, end: int
) -> AttentionProblem:
    """The problem of some spans, of its query rows only those from `first` to `end - 1`."""
    if (first, end) == (0, problem.q.shape[2]):
        return replace(problem, spans=spans)
    moved = tuple(
        replace(span, row_start=span.row_start - first, row_end=span.row_end - first)
        for span in spans
    )
    return replace(problem, q=problem.q[:, :, first:end], spans=moved)


def merge_results(
    problem: AttentionProblem, parts: Sequence[CallPart], results: Sequence[Result]
) -> Result:
    """The result of the whole call. Sequences of other parts are zero in each output. The first
    part is sparse: all that is dense is one part."""
    first = results[0]
    out = first.out.new_zeros(*problem.q.shape[:3], first.out.shape[3])
    lse = None if first.lse is None else first.lse.new_full(problem.q.shape[:3], -torch.inf)
    counts, masks, reasons = [], [], []
    for part, result in zip(parts, results, strict=True):
        rows, spans = slice(part.first, part.first + part.problem.q.shape[2]), part.problem.spans
        out[:, :, rows] += result.out
        if lse is not None and result.lse is not None:
            lse[:, :, rows] = torch.maximum(lse[:, :, rows].clone(), result.lse)
        counts.append(result.count or partial(all_keys, spans, problem.sliding_window))
        if result.mask is not None:
            masks.append((part, result.mask))
        if result.reason:
            dense_part = f"{len(spans)} of {len(problem.spans)} sequences dense: "
            reasons.append((dense_part if part.reason else "") + result.reason)
    reason, unsupported = "; ".join(dict.fromkeys(reasons)), any(x.unsupported for x in results)
    count = partial(total_count, counts)
    return Result(out, lse, _merged_masks(masks), "sparse", reason, count, unsupported)


def _merged_masks(masks: list[tuple[CallPart, BlockMask]]) -> BlockMask | None:
    """One mask with every batch row as its own part has it; dense ones have no query blocks."""
    if not masks:
        return None
    most = max((mask for _, mask in masks), key=lambda mask: mask.first.shape[1])
    whole = replace(
        most,
        indices=torch.zeros_like(most.indices),
        counts=torch.zeros_like(most.counts),
        first=torch.full_like(most.first, -1),
    )
    for part, mask in masks:
        count = mask.first.shape[1]
        for batch in {span.batch for span in part.problem.spans}:
            whole.indices[batch, :, :count] = mask.indices[batch]
            whole.counts[batch, :, :count] = mask.counts[batch]
            whole.first[batch, :count] = mask.first[batch]
    return whole
