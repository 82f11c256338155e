"""Exact attention of any rows to all their keys, with log-sum-exp: Delta's anchors,
HyperAttention's leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hip_hf.backends.tensors import Tensors, merge
from hip_hf.backends.torch.softmax import add_sink_logits, weigh_wide
from hip_hf.methods.ranking import squash
from hip_hf.workers import LOGITS_AT_ONCE, compute_dtype, run, scratch

# Rows, of all query heads of a group together, that meet their keys at once.
ROWS_AT_ONCE = 128


def rows_at_once(groups: int) -> int:
    """How many rows to take at a time, for `groups` query heads each."""
    return max(1, ROWS_AT_ONCE // groups)


def attend_exact(
    t: Tensors, head: int, rows: slice | Tensor, at: Sequence[int], start: int
) -> tuple[Tensor, ...]:
    """Output `[G, n, Dv]` and log-sum-exp `[G, n]`, in fp32 at least, without sinks, of the query
    rows `rows` at the ascending positions `at`, over the keys from `start` on; tile by tile if they
    are many."""
    q = t.q[head][:, rows]
    groups, count, dim = q.shape
    like = q.new_empty(0, dtype=compute_dtype(q))
    query = scratch.take("q", (1, groups * count, dim), like)
    query.view(groups, count, dim).copy_(q).mul_(t.scale)
    tile = max(1, LOGITS_AT_ONCE // (groups * count))
    out = lse = None
    for first in range(start, at[-1] + 1, tile):
        more, more_lse = _tile(t, head, query, at, first, min(first + tile, at[-1] + 1))
        if out is None or lse is None:
            out, lse = more, more_lse
        else:
            lse = merge(out, lse, more, more_lse)
    assert out is not None
    assert lse is not None
    return out.view(groups, count, -1), lse.view(groups, count)


def _tile(
    t: Tensors, head: int, query: Tensor, at: Sequence[int], first: int, end: int
) -> tuple[Tensor, ...]:
    """Attention to the keys `first` to `end - 1`: output `[1, G * n, Dv]` and log-sum-exp
    `[1, G * n]`."""
    k, v = (x[head : head + 1, first:end].to(query.dtype) for x in (t.k, t.v))
    logits = scratch.take("logits", (1, query.shape[1], end - first), k)
    torch.bmm(query, k.transpose(1, 2), out=logits)
    squash(logits, t.softcap)
    by_row = logits.view(-1, len(at), end - first)
    # finite, so that a row that sees nothing of a tile gets a log-sum-exp that counts for nothing,
    # and no NaN
    never = torch.finfo(logits.dtype).min
    position = torch.tensor(at, device=query.device)[:, None]
    if end > at[0] + 1:
        low = max(first, at[0] + 1)
        later = torch.arange(low, end, device=query.device) > position
        by_row[..., low - first :].masked_fill_(later, never)
    if t.sliding_window is not None:
        key = torch.arange(first, end, device=query.device)
        by_row.masked_fill_(key <= position - t.sliding_window, never)
    return weigh_wide(logits, v)


def attend_positions(t: Tensors, at: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
    """Dense attention of the rows at the ascending positions `at`, of a span whose first row sits
    at `first`: output `[Hkv, G, n, Dv]` and log-sum-exp `[Hkv, G, n]` with sinks, in fp32 at
    least."""
    heads, groups = t.q.shape[:2]
    dtype = torch.promote_types(t.q.dtype, torch.float32)
    out = torch.empty(heads, groups, len(at), t.v.shape[-1], dtype=dtype, device=t.q.device)
    lse = torch.empty(heads, groups, len(at), dtype=dtype, device=t.q.device)
    step = rows_at_once(groups)

    def attend(task: tuple[int, int]) -> None:
        head, low = task
        some = at[low : low + step]
        start = 0 if t.sliding_window is None else max(0, some[0] - t.sliding_window + 1)
        rows = torch.tensor(some, device=t.q.device) - first
        into = (head, slice(None), slice(low, low + step))
        out[into], lse[into] = attend_exact(t, head, rows, some, start)

    tasks = [(head, low) for low in range(0, len(at), step) for head in range(heads)]
    run(attend, tasks, t.q.device)
    if t.sink_logits is not None:
        add_sink_logits(out, lse, t.sink_logits)
    return out, lse
