"""Attention of query blocks in bf16, and dense attention of rows after others, through PyTorch's fused attention for CPUs.

Unlike `scaled_dot_product_attention` it returns the log-sum-exp, too, so that two parts of what rows read can be merged. It
exponentiates products in fp32 before they leave the cache, where `partial` in `block_sparse` writes them in bf16, widens them
and rounds the weights again: as long as the products themselves take. It knows no softcap, no sliding windows and no positions
of ours, and gains query blocks nothing in fp32: those are left to `partial`, which gives the same. What the rows of a query
block may not see of one another is masked by hand, since the fused attention adds its mask, and NaN would shine through.
"""

from __future__ import annotations

from itertools import groupby, pairwise

import torch

from hip_hf.methods.base import QueryBlock
from hip_hf.paged import block_index
from hip_hf.problem import Span
from hip_hf.reference import block_sparse
from hip_hf.reference.block_sparse import Parts, Tensors, alike, cuts_of, future, merge, store, store_rows, weigh_values
from hip_hf.reference.workers import compute_dtype, scratch

# Output and log-sum-exp of `[B, H, rows, D]` and `[B, H, keys, D]`: what `scaled_dot_product_attention` calls on a CPU.
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def knows(t: Tensors, rows: int) -> bool:
    """Whether it can attend for so many rows, but for what a sliding window hides. A single row gains nothing by it."""
    plain = t.softcap is None and t.positions is None and t.q.shape[-1] == t.v.shape[-1]
    return plain and rows > 1 and t.q.device.type == "cpu"


def serves(t: Tensors, block: QueryBlock) -> bool:
    """Whether query blocks such as this one go through the fused attention."""
    return knows(t, block.rows) and t.sliding_window is None and compute_dtype(t.q) == torch.bfloat16


def serves_rows(t: Tensors, span: Span) -> bool:
    """Whether dense attention of a span's rows goes through the fused attention."""
    within = t.sliding_window is None or t.sliding_window >= span.end
    return knows(t, span.rows) and within and compute_dtype(t.q) == t.q.dtype == t.k.dtype


def attend_rows(t: Tensors, first: int, span: Span) -> None:
    """Dense attention of the query rows of a span from `first` on: to all keys before them, and to their own up to themselves.
    PyTorch's own would need a mask of rows times keys, which takes it half as long again."""
    rows, at = slice(first, span.rows), span.position + first
    q = t.q[:, :, rows]
    q = q if q.stride(-1) == 1 else q.contiguous()  # which the operator takes for granted; keys and values are so

    def keys(start: int, end: int) -> list[torch.Tensor]:
        return [x[:, start:end][:, None].expand(-1, q.shape[1], -1, -1) for x in (t.k, t.v)]

    out, lse = attention(q, *keys(at, span.end), is_causal=True, scale=t.scale)
    out = out.to(lse.dtype)
    for start, end in pairwise([0, *cuts_of(t.k, 0, at), at] if at else []):
        before, before_lse = attention(q, *keys(start, end), scale=t.scale)
        lse = merge(out, lse, before.to(lse.dtype), before_lse)
    store(t, (slice(None), slice(None), rows), out, lse)


def attend(t: Tensors, heads: slice, group: slice, blocks: list[QueryBlock], ids: torch.Tensor, block_k: int) -> None:
    """Sparse attention of query blocks, for the key heads `heads` and the query heads `group` of each.

    `ids` `[heads, len(blocks), n]`: the sorted key blocks that each query block reads between sink and window.
    """
    at = 0
    for _, same in groupby(blocks, key=alike):
        run = list(same)
        need_lse = t.lse is not None or t.sinks is not None
        store_rows(t, heads, group, run, *partial(t, heads, group, run, ids[:, at : at + len(run)], block_k, need_lse))
        at += len(run)


def partial(
    t: Tensors,
    heads: slice,
    group: slice,
    blocks: list[QueryBlock],
    ids: torch.Tensor | None,
    block_k: int,
    need_lse: bool,
    near: bool = True,
    reserved: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_sparse.partial`, by the fused attention where that serves: its output and log-sum-exp are in fp32 at least then."""
    if not serves(t, blocks[0]):
        return block_sparse.partial(t, heads, group, blocks, ids, block_k, need_lse, near, reserved)
    first, count, n = blocks[0], len(blocks), blocks[0].rows
    q = t.q[heads, group, first.row : first.row + count * n]
    lanes, groups, _, dim = q.shape
    query = scratch.take("q", (count, lanes, groups, n, dim), q.new_empty(0, dtype=compute_dtype(q)))
    query.copy_(q.unflatten(2, (count, n)).permute(2, 0, 1, 3, 4))
    query = query.flatten(2, 3)

    parts = []
    if ids is not None and ids.shape[2]:
        parts.append(_selected(t, heads, query, blocks, ids, block_k))
    if near:
        parts.append(_own(t, heads, query, blocks))
        if first.first > first.window:
            windows = [_windows(x[heads, first.window : blocks[-1].first], first.first - first.window, n) for x in (t.k, t.v)]
            parts.append(_attend(query, *windows, t.scale))
    out, lse = parts[0]
    for more, more_lse in parts[1:]:
        lse = merge(out, lse, more, more_lse)
    out = out.view(count, lanes, groups, n, dim).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return out, lse.view(count, lanes, groups, n).permute(1, 2, 0, 3).flatten(2, 3)


def _attend(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row of `query` to every key: output and log-sum-exp, in fp32 at least."""
    out, lse = attention(query, k.to(query.dtype), v.to(query.dtype), scale=scale)
    return out.to(lse.dtype), lse


def _windows(x: torch.Tensor, size: int, step: int) -> torch.Tensor:
    """Views `[windows, heads, size, D]` of `x` `[heads, T, D]`, each `step` keys after the one before."""
    return x.unfold(1, size, step).permute(1, 0, 3, 2)


def _selected(
    t: Tensors, heads: slice, query: torch.Tensor, blocks: list[QueryBlock], ids: torch.Tensor, block_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the key blocks that each query block selected, which are brought together one query block after another."""
    count, lanes, rows, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    out = scratch.take("out", tuple(query.shape), query.new_empty(0, dtype=wide))
    lse = torch.empty(count, lanes, rows, dtype=wide)
    k, v = (Parts(name, x[heads], blocks, 0, ids.shape[2] * block_k, 0, block_k) for name, x in (("k", t.k), ("v", t.v)))
    for i, index in enumerate(block_index(t.k[heads], ids, block_k).unbind(1)):
        for part in (k, v):
            part.fill(i, index.unbind(0))
        out[i : i + 1], lse[i : i + 1] = _attend(query[i : i + 1], k.all[None], v.all[None], t.scale)
    return out, lse


def _own(t: Tensors, heads: slice, query: torch.Tensor, blocks: list[QueryBlock]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the rows to the sink, and to the keys of their own block up to themselves."""
    count, lanes, rows, dim = query.shape
    first, n = blocks[0], blocks[0].rows
    sink = first.sink - first.start
    keys = []
    for name, x in (("k", t.k), ("v", t.v)):
        both = scratch.take(name, (count, lanes, sink + n, dim), query)
        both[:, :, :sink] = x[heads, first.start : first.sink]
        both[:, :, sink:] = x[heads, first.first : blocks[-1].last + 1].unflatten(1, (count, n)).transpose(0, 1)
        keys.append(both.flatten(0, 1))
    logits = scratch.take("logits", (count * lanes, rows, sink + n), query)
    torch.bmm(query.flatten(0, 1), keys[0].transpose(1, 2), out=logits).mul_(t.scale)
    logits.view(count * lanes, rows // n, n, sink + n)[..., sink:].masked_fill_(future(n, logits.device), -torch.inf)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty(count, lanes, rows, dtype=wide)
    out = scratch.take("own", tuple(query.shape), query)
    weigh_values(logits, keys[1], out.flatten(0, 1), lse.flatten(0, 1))
    return out.to(wide), lse
