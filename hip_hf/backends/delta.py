"""Delta correction (arXiv 2505.11254): compute every `gamma`-th row densely, the *anchors*, and add
what sparse attention missed there to the rows up to the next anchor, which rests on its changing
slowly. S: sparse, by any method; D: dense.

    out[i] = S[i] + (D[j] - S[j]),   j = gamma * floor(i / gamma)

Anchors are the positions that `gamma` divides, and the first row of a call. They get D itself. The
last `gamma` rows of a prefill call are dense. Decode goes on alike: a step at an anchor is dense,
and its difference is kept with the cache. The log-sum-exp is corrected alike. Costs `1 / gamma` of
dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from hip_hf.backends.base import Executor, MakeExecutor
from hip_hf.backends.keys_read import Count
from hip_hf.geometry import keys_seen_at
from hip_hf.state import Correction, RowState

if TYPE_CHECKING:
    from hip_hf.geometry import Span
    from hip_hf.state import DecodeState


def anchors(first: int, end: int, gamma: int, known: int | None) -> list[int]:
    """Positions from `first` to `end - 1` to compute densely; `known`: the anchor whose difference
    was kept."""
    own = list(range(-(-first // gamma) * gamma, end, gamma))
    if first < end and first % gamma and (known is None or known // gamma != first // gamma):
        own.insert(0, first)
    return own


@dataclass(frozen=True)
class Plan:
    """What to correct in one span: its rows at positions `span.position` to `end - 1`, by the
    anchors `at`; `kept` is the correction that holds in front of the first of them, if any row is
    there."""

    span: Span
    end: int
    at: list[int]
    kept: Correction | None


@dataclass(eq=False)
class DeltaCall(Executor):
    """One call: another attention, whose executor `attention` makes, and its correction. A backend
    adds `correct`. There are no gradients. A log-sum-exp is made where none is given."""

    attention: MakeExecutor = field(kw_only=True)

    @classmethod
    def around(cls, attention: MakeExecutor) -> MakeExecutor:
        """Return what makes the executor of that attention and its correction."""
        return partial(cls, attention=attention)

    def __post_init__(self) -> None:
        problem, config = self.problem, self.config
        assert config.delta is not None
        self.gamma = config.delta
        if self.lse is None:
            dtype = torch.promote_types(problem.q.dtype, torch.float32)
            self.lse = problem.q.new_full(problem.q.shape[:3], -torch.inf, dtype=dtype)
        # the correction must not come twice
        inner = replace(config, delta=None, dense_tail=max(config.dense_tail, self.gamma))
        self.inner = self.attention(problem, inner, self.out, self.lse, self.need_mask)
        self.mask = self.inner.mask
        self.at: list[list[int]] = []  # the anchors of each span

    @property
    def count(self) -> Count:
        return partial(with_anchors, self.inner.count, self.at, self.problem.sliding_window)

    def correct(self, plans: list[Plan]) -> list[Correction | None]:
        """Correct the rows of every plan; the corrections that hold after their last rows."""
        raise NotImplementedError

    def run(self, state: DecodeState | None) -> None:
        self.inner.run(state)
        spans = self.problem.spans
        rows = [RowState(0) if state is None else state.rows[span.batch] for span in spans]
        plans = [self._plan(span, row.correction) for span, row in zip(spans, rows, strict=True)]
        self.at = [plan.at for plan in plans]
        for row, correction in zip(rows, self.correct(plans), strict=True):
            row.correction = correction

    def _plan(self, span: Span, kept: Correction | None) -> Plan:
        end = span.position + self.inner.tail(span)
        at = anchors(span.position, end, self.gamma, None if kept is None else kept.position)
        return Plan(span, end, at, None if at and at[0] == span.position else kept)


def with_anchors(count: Count, at: list[list[int]], sliding: int | None) -> tuple[float, float]:
    """Keys read and keys in sight where the rows at the positions `at` read all keys besides."""
    read, visible = count()
    return min(read + sum(keys_seen_at(some, sliding) for some in at), visible), visible
