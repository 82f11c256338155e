"""Dense attention, torch backend: PyTorch's own where it can serve, else block by block. Never all
logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hip_hf.backends.base import Piece
from hip_hf.backends.sdpa import grouped_sdpa
from hip_hf.backends.tensors import Tensors
from hip_hf.backends.torch import fused
from hip_hf.backends.torch.block_sparse import attend_range
from hip_hf.cache.pages import PagedKeys, PagedTensor, rows_of
from hip_hf.geometry import QueryBlock, Span
from hip_hf.problem import AttentionProblem, exporting
from hip_hf.workers import LOGITS_AT_ONCE, run

# Rows that meet all their keys at once in the block-by-block path.
ROWS_AT_ONCE = 64
# With a mask PyTorch's attention on a GPU computes this many logits of a group's member at a time.
LOGITS_ON_GPU = 1 << 27


def range_tasks(t: Tensors, first: int, span: Span) -> list[tuple[slice, QueryBlock]]:
    """Key heads and query rows for each `attend_range` of a dense computation of the query rows
    from `first` on: head by head, a single row for all heads at once, which takes as little as the
    operations that it is made of."""
    tasks, kv_heads = [], t.q.shape[0]
    each = kv_heads if span.rows == 1 else 1
    for row in range(first, span.rows, ROWS_AT_ONCE):
        last = min(row + ROWS_AT_ONCE, span.rows) - 1
        position = span.position + row
        start = 0 if t.sliding_window is None else max(0, position - t.sliding_window + 1)
        block = QueryBlock(row, position, span.position + last, start, start, 0, 0, start)
        tasks += [(slice(head, head + each), block) for head in range(0, kv_heads, each)]
    return tasks


def attend_rows(t: Tensors, first: int, span: Span, pieces: list[Piece] | None = None) -> None:
    """The query rows of a span from `first` on, through PyTorch's fused attention where that
    serves, else block by block. What they read is added to `pieces`, for the gradients."""
    served = fused.serves_rows(t, span)
    if served:
        fused.attend_rows_fused(t, first, span)
        if pieces is None:
            return
    tasks = range_tasks(t, first, span)
    if pieces is not None:
        pieces += [Piece(span, heads, [block], None, 1, span.rows) for heads, block in tasks]
    if not served:
        run(lambda task: attend_range(t.part(task[0]), task[1]), tasks, t.q.device)


def sdpa_serves(problem: AttentionProblem, need_lse: bool) -> bool:
    """Whether PyTorch's attention can compute the problem without a mask."""
    if not sdpa_serves_masked(problem, need_lse):
        return False
    if problem.sliding_window is not None and problem.sliding_window < problem.longest:
        return False
    return all(
        (span.rows == 1 or span.position == 0) and _in_one_piece(problem, span)
        for span in problem.spans
    )


def sdpa_serves_masked(problem: AttentionProblem, need_lse: bool) -> bool:
    """Whether PyTorch's attention can compute the problem with a mask where rows see other keys
    than all up to their own: chunks of prompts, and sliding windows. On a GPU that is far fewer
    launches than block by block; a CPU has `fused`."""
    plain = problem.positions is None and problem.softcap is None and problem.sinks is None
    return plain and not need_lse


def _in_one_piece(problem: AttentionProblem, span: Span) -> bool:
    keys = rows_of(problem.k, span.batch, span.key_start, span.key_start + span.end)
    return not (isinstance(keys, PagedKeys) and keys.borders(0, span.end))


def spans_alike(problem: AttentionProblem) -> bool:
    """Whether all batch rows are one sequence each, of the same keys and rows, so that one call
    serves them."""
    if isinstance(problem.k, PagedTensor):
        return False
    first = problem.spans[0]
    kinds = {(s.key_start, s.key_start + s.end, s.row_start, s.row_end) for s in problem.spans}
    every = len(problem.spans) == len(problem.q) and first.rows == problem.q.shape[2]
    return every and len(kinds) == 1


def sdpa(problem: AttentionProblem, span: Span, batch: slice = slice(None)) -> Tensor:
    """PyTorch's attention of a span's rows to its keys, for the batch rows `batch`:
    `[batch, Hq, rows, Dv]`."""
    q = problem.q[batch, :, span.row_start : span.row_end]
    window = problem.sliding_window or span.end  # one as wide as that hides nothing
    begin = max(0, span.position - window + 1)
    k, v = (_range(x, span, batch, begin) for x in (problem.k, problem.v))
    if span.rows == 1 or (span.position == 0 and window >= span.end):
        return grouped_sdpa(q, k, v, problem.scale, span.rows > 1)
    # PyTorch may hold the logits of all rows of a mask; more rows than a window would multiply what
    # none of them sees
    step = max(1, LOGITS_ON_GPU // (span.end * len(k) * k.shape[1]))
    step, outs = min(step, max(window, ROWS_AT_ONCE)), []
    for row in range(0, span.rows, step):
        some, first = q[:, :, row : row + step], span.position + row
        end = first + some.shape[2]
        low = max(0, first - window + 1)
        at, key = (torch.arange(*ends, device=q.device) for ends in ((first, end), (low, end)))
        seen = (key <= at[:, None]) & (key > at[:, None] - window)
        keys = slice(low - begin, end - begin)
        outs.append(grouped_sdpa(some, k[:, :, keys], v[:, :, keys], problem.scale, False, seen))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _range(x: Tensor, span: Span, batch: slice, begin: int) -> Tensor:
    """A span's keys (or values) from position `begin` on, `[batch, Hkv, end - begin, D]`."""
    first, last = span.key_start + begin, span.key_start + span.end
    if isinstance(x, PagedTensor):
        return rows_of(x, span.batch, first, last)[:, :][None]
    return x[batch, :, first:last]


def masked(
    problem: AttentionProblem, visible: Callable[[int, int], Tensor], need_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention under an arbitrary mask, for what spans cannot say and for what traces tensors; a
    few rows at a time.

    `visible(first, last)` tells what rows `first` to `last - 1` see, `[B, Hq, last - first, Tk]`
    (or 1 for a dimension in which all is alike): booleans, or numbers that are added to the logits.
    Returns the output and, if asked for, the log-sum-exp. A row that sees nothing (no True, or
    nothing above minus infinity) gives 0 and -inf.
    """
    k, v = (x.repeat_interleave(problem.groups, 1) for x in (problem.k, problem.v))
    rows = problem.q.shape[2]
    # an exported graph may be for any number of rows
    step = rows if exporting() else max(1, LOGITS_AT_ONCE // (k.shape[0] * k.shape[1] * k.shape[2]))
    if step >= rows:
        return _masked_rows(problem, problem.q, k, v, visible(0, rows), need_lse)
    parts = []
    for at in range(0, rows, step):
        end = min(at + step, rows)
        some = problem.q[:, :, at:end]
        parts.append(_masked_rows(problem, some, k, v, visible(at, end), need_lse))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if need_lse else None


def _masked_rows(
    problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The query rows q under `mask`, with as many key heads as query heads. Without writes in
    place: `torch.func` allows none."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(2, 3)).to(dtype) * problem.scale
    if problem.softcap is not None:
        logits = torch.tanh(logits / problem.softcap) * problem.softcap
    # finite, so that a row that sees nothing has no NaN in its gradient
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask != -torch.inf
        logits = logits + mask.to(dtype).clamp(min=lowest)
    logits = logits.masked_fill(~seen, lowest)
    if problem.sinks is not None:
        sink = problem.sinks.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : k.shape[2]].masked_fill(~seen, 0.0)
    out = weights.to(v.dtype) @ v
    if not need_lse:
        return out, None
    nothing = ~seen.any(-1) if problem.sinks is None else torch.zeros_like(seen[..., 0])
    return out, torch.logsumexp(logits, dim=-1).masked_fill(nothing, -torch.inf)


def sight(
    problem: AttentionProblem, key_start: Tensor | None, q_start: Tensor | None
) -> Callable[[int, int], Tensor]:
    """What rows `first` to `last - 1` see, boolean `[B or 1, 1, last - first, Tk]`, for `masked`.
    Looks at no numbers."""
    rows, keys, device = problem.q.shape[2], problem.k.shape[2], problem.q.device

    def column(x: Tensor) -> Tensor:
        return torch.as_tensor(x, device=device)[:, None, None, None]

    begin = 0 if key_start is None else column(key_start)
    start = keys - rows if q_start is None else column(q_start)
    key = torch.arange(keys, device=device)

    def sight(first: int, last: int) -> Tensor:
        row = torch.arange(first, last, device=device)[:, None] + start
        seen = (key >= begin) & (key <= row)
        if problem.sliding_window is not None:
            seen = seen & (key > row - problem.sliding_window)
        return seen if seen.ndim == 4 else seen[None, None]

    return sight
