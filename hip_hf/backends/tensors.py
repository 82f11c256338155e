"""One sequence's part of a call's tensors, and merging of partial results: for every backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hip_hf.cache.pages import KeyRows, PagedKeys, rows_of
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem
from hip_hf.rope import Positions


@dataclass(frozen=True, eq=False)
class Tensors:
    """One span's tensors: q `[Hkv, G, rows, D]`, k `[Hkv, T, D]`, v `[Hkv, T, Dv]`, out
    `[Hkv, G, rows, Dv]`, lse `[Hkv, G, rows]` or None, sink_logits `[Hkv, G]` or None. Rows of k
    and v are contiguous, or in pages."""

    q: Tensor
    k: KeyRows
    v: KeyRows
    out: Tensor
    lse: Tensor | None
    scale: float
    sliding_window: int | None
    softcap: float | None
    sink_logits: Tensor | None
    positions: Positions | None = None  # q and k are not rotated: here is where they go

    def part(self, heads: slice, group: slice = slice(None)) -> Tensors:
        """Return the part of the key heads `heads`, and of the query heads `group` of each of
        them."""
        q, out = self.q[heads, group], self.out[heads, group]
        lse, sink_logits = (
            None if x is None else x[heads, group] for x in (self.lse, self.sink_logits)
        )
        k, v = self.k[heads], self.v[heads]
        return replace(self, q=q, k=k, v=v, out=out, lse=lse, sink_logits=sink_logits)


def tensors_of(problem: AttentionProblem, span: Span, out: Tensor, lse: Tensor | None) -> Tensors:
    """Return the span's part of the problem's tensors and of the results `out` `[B, Hq, Tq, Dv]`
    and `lse` `[B, Hq, Tq]`, heads grouped by key head."""
    rows = slice(span.row_start, span.row_end)
    heads = problem.k.shape[1]

    def grouped(x: Tensor) -> Tensor:
        return x[span.batch].unflatten(0, (heads, problem.groups))[:, :, rows]

    def keys_in_sight(x: Tensor) -> KeyRows:
        """Without padding, one key after the other in memory."""
        keys = rows_of(x, span.batch, span.key_start, span.key_start + span.end)
        if isinstance(keys, PagedKeys):
            return keys
        dense = keys.stride(-1) == 1 and keys.stride(-2) == keys.shape[-1]
        return keys if dense else keys.contiguous()

    q, k, v = grouped(problem.q), keys_in_sight(problem.k), keys_in_sight(problem.v)
    lse = None if lse is None else grouped(lse)
    sink_logits = problem.sinks
    if sink_logits is not None:
        sink_logits = sink_logits.unflatten(0, (heads, problem.groups))
    rules = (problem.scale, problem.sliding_window, problem.softcap, sink_logits, problem.positions)
    return Tensors(q, k, v, grouped(out), lse, *rules)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """Merge two partial results, outputs `[..., Dv]` and log-sum-exps `[...]`, into `out`. The
    merged log-sum-exp. Weights add up to 1 also where logits are so large that a log-sum-exp cannot
    tell how many there are."""
    out.lerp_(more, torch.sigmoid(more_lse - lse)[..., None])
    return torch.logaddexp(lse, more_lse)
