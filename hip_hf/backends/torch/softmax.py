"""The softmax of logits that are there, and its log-sum-exp, torch backend: what rows of every kind
of attention weigh their values by."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_hf.workers import scratch, widened


def weigh_values(logits: Tensor, v: Tensor, out: Tensor, need_lse: bool) -> Tensor | None:
    """Softmax of logits `[N, rows, keys]`, which are overwritten, times v `[N, keys, Dv]`, into
    `out` `[N, rows, Dv]`. Returns their log-sum-exp `[N, rows]` (fp32 at least) if it is wanted."""
    if not need_lse:
        torch.bmm(torch.softmax(logits, dim=-1, out=logits), v, out=out)
        return None
    wide = widened(logits)
    total, lse = exponentiate(wide)
    if wide is logits:
        torch.bmm(logits, v, out=out).div_(total)  # fewer numbers than the weights are
    else:
        torch.bmm(logits.copy_(wide.div_(total)), v, out=out)
    return lse


def weigh_wide(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `weigh_values`, for results that are merged or compared with others: returns the output
    `[N, rows, Dv]` and the log-sum-exp `[N, rows]`, in fp32 at least. Exponentials of half
    precision are taken as they are."""
    total, lse = exponentiate(logits)
    out = torch.bmm(logits, v, out=scratch.take("out", (*logits.shape[:2], v.shape[-1]), logits))
    return out / total, lse


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of logits `[..., keys]`, in their place, over each row's highest. Returns their
    sum `[..., 1]` and the log-sum-exp `[...]` of the logits, both in fp32 at least. A row whose
    logits have all overflowed to -inf weighs nothing beside what else it reads, and is no NaN."""
    limits, wide = torch.finfo(logits.dtype), torch.promote_types(logits.dtype, torch.float32)
    highest = logits.amax(-1, keepdim=True).clamp_(min=limits.min)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True, dtype=wide).clamp_(min=limits.tiny)
    return total, total.log().add_(highest)[..., 0]


def add_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> None:
    """Let the extra logits `sink_logits` `[Hkv, G]` take part in a softmax: changes out
    `[Hkv, G, n, Dv]` and lse `[Hkv, G, n]`."""
    sink = sink_logits[..., None].to(lse.dtype)
    out.mul_(torch.sigmoid(lse - sink)[..., None])
    torch.logaddexp(lse, sink, out=lse)
