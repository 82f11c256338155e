"""Delta correction, torch backend (`backends/delta.py`): dense rows by PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from hip_hf.backends.delta import DeltaCall, Plan
from hip_hf.backends.tensors import tensors_of
from hip_hf.backends.torch.dense_rows import attend_positions
from hip_hf.state import Correction


class DeltaAttention(DeltaCall):
    """One call on any device, by PyTorch's operations."""

    def correct(self, plans: list[Plan]) -> list[Correction | None]:
        return [self._correct(plan) for plan in plans]

    def _correct(self, plan: Plan) -> Correction | None:
        span, at, kept = plan.span, plan.at, plan.kept
        t = tensors_of(self.problem, span, self.out, self.lse)
        assert t.lse is not None
        parts = []  # of out and log-sum-exp, one after the other in `at`
        if kept is not None:
            parts.append((kept.out[:, :, None], kept.lse[:, :, None]))
        if at:
            index = torch.tensor(at, device=t.q.device) - span.position
            out, lse = attend_positions(t, at, span.position)
            parts.append((out - t.out[:, :, index], lse - t.lse[:, :, index]))
        if not parts:
            return None
        if kept is not None:
            at = [kept.position, *at]
        out, lse = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        rows = torch.arange(span.position, plan.end, device=t.q.device)
        for x, difference in ((t.out, out), (t.lse, lse)):
            some = x[:, :, : len(rows)]
            some.copy_(some + spread(difference, torch.tensor(at, device=rows.device), rows))
        return Correction(at[-1], out[:, :, -1].clone(), lse[:, :, -1].clone())


def spread(difference: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Differences `[Hkv, G, anchors, ...]` at the positions `at`, brought to those of the rows,
    each of which is at an anchor or after one."""
    return difference[:, :, torch.searchsorted(at, rows, right=True) - 1]
