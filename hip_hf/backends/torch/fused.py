"""Dense attention of rows after others, through PyTorch's fused attention for CPUs.

Unlike `scaled_dot_product_attention` it returns the log-sum-exp, too, so that two parts of what
rows read can be merged: all keys before them, and their own. It knows no softcap, no sliding window
that hides anything and no `Positions`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hip_hf.backends.tensors import Tensors, merge
from hip_hf.backends.torch.block_sparse import cuts_of, store
from hip_hf.geometry import Span
from hip_hf.workers import compute_dtype

# Output and log-sum-exp of `[B, H, rows, D]` and `[B, H, keys, D]`: what
# `scaled_dot_product_attention` calls on a CPU.
fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def serves_rows(t: Tensors, span: Span) -> bool:
    """Whether dense attention of a span's rows goes through the fused attention. A single row gains
    nothing by it."""
    plain = t.softcap is None and t.positions is None and t.q.shape[-1] == t.v.shape[-1]
    within = t.sliding_window is None or t.sliding_window >= span.end
    alike = compute_dtype(t.q) == t.q.dtype == t.k.dtype
    return plain and within and alike and span.rows > 1 and t.q.device.type == "cpu"


def attend_rows_fused(t: Tensors, first: int, span: Span) -> None:
    """Dense attention of the query rows of a span from `first` on: to all keys before them, and to
    their own up to themselves. PyTorch's own would need a mask of rows times keys, which takes it
    half as long again."""
    rows, at = slice(first, span.rows), span.position + first
    q = t.q[:, :, rows]
    # which the operator takes for granted; keys and values are so
    q = q if q.stride(-1) == 1 else q.contiguous()

    def keys(start: int, end: int) -> list[Tensor]:
        return [x[:, start:end][:, None].expand(-1, q.shape[1], -1, -1) for x in (t.k, t.v)]

    out, lse = fused_attention(q, *keys(at, span.end), is_causal=True, scale=t.scale)
    out = out.to(lse.dtype)
    for start, end in pairwise([0, *cuts_of(t.k, 0, at), at] if at else []):
        before, before_lse = fused_attention(q, *keys(start, end), scale=t.scale)
        lse = merge(out, lse, before.to(lse.dtype), before_lse)
    store(t, rows, out, lse)
