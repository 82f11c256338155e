"""Padding in the middle of a batch row: what comes before the last run of real keys is read whole, and merged with the rest.

Prompt and prefix tuning put a few learned tokens before a left-padded prompt. Each run of keys is a sequence by itself for its
own query rows; rows of a later run also see all keys of the runs before.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from hip_hf.attention import Result, attend
from hip_hf.backends.keys_read import Count, all_keys
from hip_hf.backends.tensors import merge
from hip_hf.backends.torch import dense
from hip_hf.cache.pages import rows_of
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.integration.masks import LAST
from hip_hf.problem import AttentionProblem
from hip_hf.state import DecodeState


def mask_runs(mask: torch.Tensor, rows: int) -> list[Span]:
    """The runs of real keys of every batch row, as spans; without rows where a run holds no query. `mask`: one of hip's, of
    positions. Worked out once per forward."""
    known = getattr(mask, "_hip_runs", None)
    if known is not None and known[0] == rows:
        return known[1]
    places = mask[:, 0, 0].cpu() - LAST + rows - 1  # the query rows are at 0 to rows - 1
    real = places < rows  # else padding, or beyond the last query
    goes_on = real[:, 1:] & real[:, :-1] & (places.diff() == 1)
    edge = torch.zeros_like(real[:, :1])
    starts = (real & ~torch.cat([edge, goes_on], dim=1)).nonzero().tolist()
    ends = (real & ~torch.cat([goes_on, edge], dim=1)).nonzero().tolist()
    runs = []
    for (batch, start), (_, last) in zip(starts, ends, strict=True):
        at = int(places[batch, start])
        first, end = max(0, at), max(0, at + last + 1 - start)
        runs.append(Span(batch, start, last + 1, first, end, first - at))
    mask._hip_runs = (rows, runs)  # type: ignore[attr-defined]
    return runs


def before(runs: list[Span], run: Span) -> list[Span]:
    """The runs of the same batch row before this one."""
    return [other for other in runs if other.batch == run.batch and other.key_start < run.key_start]


def few_before(problem: AttentionProblem, config: HiPConfig, runs: list[Span]) -> bool:
    """Whether what comes before is so little that it can be read whole: no more than a sparse row reads anyway."""
    if problem.sliding_window is not None or problem.positions is not None:
        return False
    return all(sum(other.keys for other in before(runs, run)) <= config.sparse_reach for run in runs)


def attend_runs(
    problem: AttentionProblem, config: HiPConfig, layer: int | None, state: DecodeState | None, runs: list[Span]
) -> Result:
    """Attention of every run to itself, as the settings say, and to all keys of the runs before it."""
    spans = tuple(run for run in runs if run.rows > 0)
    if len({span.batch for span in spans}) < len(spans):
        state = None  # it follows one sequence a batch row: decode will
    result = attend(replace(problem, spans=spans), config, layer, state, need_lse=True)
    assert result.lse is not None
    out = result.out.clone()
    for span in spans:
        rows = slice(span.row_start, span.row_end)
        own_lse = result.lse[span.batch, :, rows]
        own = out[span.batch, :, rows].to(own_lse.dtype)
        for other in before(runs, span):
            more, more_lse = _whole(problem, span, other)
            own_lse = merge(own, own_lse, more.to(own.dtype), more_lse)
        out[span.batch, :, rows] = own
    return replace(result, out=out, lse=None, count=partial(_count, result.count, spans, runs))


def _count(count: Count | None, spans: tuple[Span, ...], runs: list[Span]) -> tuple[float, float]:
    """Keys read and keys in sight, those of the runs before among both."""
    read, visible = count() if count is not None else all_keys(spans, None)
    whole = sum(span.rows * other.keys for span in spans for other in before(runs, span))
    return read + whole, visible + whole


def _whole(problem: AttentionProblem, span: Span, other: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a span's rows for all keys of another. (Sink logits count once, with the rows' own keys.)"""
    q = problem.q[span.batch, :, span.row_start : span.row_end][None]
    k, v = (rows_of(x, other.batch, other.key_start, other.key_end)[:, :][None] for x in (problem.k, problem.v))
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    part = replace(problem, q=q, k=k, v=v, sinks=None)
    out, lse = dense.masked(part, lambda first, last: everything, need_lse=True)
    assert lse is not None
    return out[0], lse[0]
