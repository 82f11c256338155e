"""Delta correction (arXiv 2505.11254): what sparse attention misses changes slowly from row to row, so compute it
densely for every `gamma`-th row only, and add it to the rows after it.

    out[i] = S[i] + (D[j] - S[j]),   j = gamma * floor(i / gamma)       S: sparse, by any method; D: dense

`j` are the *anchors*: positions that `gamma` divides, and the first row of a call. The last `gamma` rows of a prefill call
are dense. `interpolate` moves from one anchor's difference to the next one's instead; that looks at up to `gamma` later
rows, so it is not causal. Decode goes on as `step`: a step at an anchor is dense and its difference, kept with the cache,
serves the steps up to the next anchor. The log-sum-exp is corrected alike. Costs `1 / gamma` of dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hip_hf.methods import attention_for
from hip_hf.reference.exact import attend_positions
from hip_hf.reference.sparse import DECODE_ROWS, keys_seen, tensors_of
from hip_hf.state import Correction, RowState

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.problem import AttentionProblem, Span
    from hip_hf.state import DecodeState


def anchors(first: int, end: int, gamma: int, known: int | None) -> list[int]:
    """Positions from `first` to `end - 1` to compute densely; `known`: the anchor whose difference was kept."""
    own = list(range(-(-first // gamma) * gamma, end, gamma))
    if first < end and first % gamma and (known is None or known // gamma != first // gamma):
        own.insert(0, first)
    return own


@dataclass(frozen=True)
class Plan:
    """What to correct in one span: its rows at positions `span.position` to `end - 1`, by the anchors `at`; `kept` is the
    correction that holds in front of the first of them, if any row is there."""

    span: Span
    end: int
    at: list[int]
    kept: Correction | None


class DeltaAttention:
    """One call: another attention, and its correction."""

    def __init__(
        self, problem: AttentionProblem, config: HiPConfig, out: torch.Tensor, lse: torch.Tensor | None, mask: bool
    ) -> None:
        assert config.delta is not None
        self.problem, self.config, self.gamma, self.out = problem, config, config.delta, out
        shape, dtype = problem.q.shape[:3], torch.promote_types(problem.q.dtype, torch.float32)
        self.lse = torch.full(shape, -torch.inf, dtype=dtype, device=problem.q.device) if lse is None else lse
        # the rows at the end are dense, and the correction must not come twice
        inner = replace(config, delta=None, dense_tail=max(config.dense_tail, config.delta))
        self.inner = self.attention(inner)(problem, inner, out, self.lse, mask)
        self.reading = self.inner.reading

    @staticmethod
    def attention(config: HiPConfig) -> Any:
        """The class of the attention to correct."""
        return attention_for(config)

    @property
    def mask(self):  # type: ignore[no-untyped-def]
        return self.inner.mask

    @property
    def decoding(self) -> bool:
        return self.problem.q.shape[2] <= DECODE_ROWS

    @property
    def interpolating(self) -> bool:
        return self.config.delta_mode == "interpolate" and not self.decoding

    def run(self, state: DecodeState | None) -> None:
        self.inner.run(state)
        spans = self.problem.spans
        rows = [RowState(0) if state is None else state.rows[span.batch] for span in spans]
        plans = [self._plan(span, row.correction) for span, row in zip(spans, rows, strict=True)]
        for row, correction in zip(rows, self.correct(plans), strict=True):
            row.correction = correction
        sliding = self.problem.sliding_window
        self.reading.read += sum(keys_seen(at, at, sliding) for plan in plans for at in plan.at)
        self.reading.read = min(self.reading.read, self.reading.visible)

    def _plan(self, span: Span, kept: Correction | None) -> Plan:
        end = span.end if self.decoding else max(span.position, span.end - self.inner.config.dense_tail)
        at = anchors(span.position, end, self.gamma, None if kept is None else kept.position)
        return Plan(span, end, at, None if at and at[0] == span.position else kept)

    def correct(self, plans: list[Plan]) -> list[Correction | None]:
        """Correct the rows of every plan; the corrections that hold after their last rows."""
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
            some.copy_(some + spread(difference, torch.tensor(at, device=rows.device), rows, self.interpolating))
        return Correction(at[-1], out[:, :, -1].clone(), lse[:, :, -1].clone())


def spread(difference: torch.Tensor, at: torch.Tensor, rows: torch.Tensor, interpolate: bool) -> torch.Tensor:
    """Differences `[Hkv, G, anchors, ...]` at the positions `at`, brought to those of the rows; each row is at an anchor or
    after one. After the last anchor both modes hold its difference."""
    segment = torch.searchsorted(at, rows, right=True) - 1
    change = difference[:, :, segment]
    if not interpolate:
        return change
    following = (segment + 1).clamp(max=len(at) - 1)
    length = (at[following] - at[segment]).clamp(min=1)
    share = torch.where(following > segment, rows - at[segment], 0).to(change.dtype) / length
    share = share.view(-1, *[1] * (change.ndim - 3))
    return change.lerp(difference[:, :, following], share)
