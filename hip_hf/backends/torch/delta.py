"""Delta correction (arXiv 2505.11254): compute what sparse attention misses densely for every `gamma`-th row only, the
*anchors*, and make use of it in the rows after it. S: sparse, by any method; D: dense.

`step`, as published: the difference is added to the rows up to the next anchor, which rests on its changing slowly.

    out[i] = S[i] + (D[j] - S[j]),   j = gamma * floor(i / gamma)

`clusters`: where what is missed depends on the query, it is another one in the next row. So every row first estimates its own
missing part from clusters of keys (`missing.py`), which gives E; the anchors correct what is left, by a mean over the latest
of them, for what is left is mostly noise:

    out[i] = E[i] + mean of (D[j] - E[j]) over anchors j <= i, of which each weighs 15/16 of the next

Anchors are the positions that `gamma` divides; in `step` also the first row of a call. They get D itself. The last `gamma` rows
of a prefill call are dense. `interpolate` moves from one anchor's difference to the next one's instead; that looks at up to
`gamma` later rows, so it is not causal. Decode goes on as `step` (or `clusters`): a step at an anchor is dense, and what the next
ones need is kept with the cache. The log-sum-exp is corrected alike. Costs `1 / gamma` of dense attention, `clusters` also
as much as a hundred keys more for each row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hip_hf.backends.torch.block_sparse import Tensors, merge
from hip_hf.backends.torch.clusters import Chosen, Clusters, alike, estimate
from hip_hf.backends.torch.dense_rows import attend_positions
from hip_hf.backends.torch.keys_read import keys_seen_at
from hip_hf.backends.torch.sparse import DECODE_ROWS, tensors_of
from hip_hf.methods import attention_for, selects
from hip_hf.state import Correction, RowState

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.methods.base import QueryBlock
    from hip_hf.problem import AttentionProblem, Span
    from hip_hf.state import DecodeState

# What an anchor's correction weighs of the next one's: a mean over about 16 of them.
DECAY = 15 / 16


def mode_of(config: HiPConfig, sliding_window: int | None) -> tuple[str, str]:
    """The mode in which a call is corrected, and why it is not `config.delta_mode`."""
    if config.delta_mode != "clusters":
        return config.delta_mode, ""
    why = ""
    if not selects(config.method):
        why = f"method {config.method} selects no key blocks"
    elif sliding_window is not None:
        why = "keys leave the sliding window"
    return ("step", f"Delta correction by steps: {why}") if why else ("clusters", "")


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
        self.mode, _ = mode_of(config, problem.sliding_window)
        self.need_mask, clusters = mask, self.mode == "clusters"
        # the rows at the end are dense: where the next call goes on with what their anchors say, once that is known
        self.tail = max(config.dense_tail, config.delta)
        # the correction must not come twice
        inner = replace(config, delta=None, dense_tail=0 if clusters else self.tail)
        self.inner = self.attention(inner)(problem, inner, out, self.lse, mask or clusters)
        self.reading = self.inner.reading

    @staticmethod
    def attention(config: HiPConfig) -> Any:
        """The class of the attention to correct."""
        return attention_for(config)

    @property
    def mask(self):  # type: ignore[no-untyped-def]
        return self.inner.mask if self.need_mask else None

    @property
    def decoding(self) -> bool:
        return self.problem.q.shape[2] <= DECODE_ROWS

    @property
    def interpolating(self) -> bool:
        return self.mode == "interpolate" and not self.decoding

    def dense(self, t: Tensors, span: Span, at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of a span's rows at the anchors `at`, `gamma` apart: output `[Hkv, G, n, Dv]` and log-sum-exp
        `[Hkv, G, n]`, in fp32 at least."""
        return attend_positions(t, at, span.position)

    def attend_tail(self, t: Tensors, span: Span, end: int) -> None:
        """Dense attention of a span's rows from position `end` on."""
        rows = slice(end - span.position, None)
        assert t.lse is not None
        t.out[:, :, rows], t.lse[:, :, rows] = attend_positions(t, range(end, span.end), span.position)

    def run(self, state: DecodeState | None) -> None:
        self.inner.run(state)
        spans = self.problem.spans
        rows = [RowState(0) if state is None else state.rows[span.batch] for span in spans]
        if self.mode == "clusters":
            for span, row in zip(spans, rows, strict=True):
                self._complete(span, row)
        else:
            plans = [self._plan(span, row.correction) for span, row in zip(spans, rows, strict=True)]
            for plan, row, correction in zip(plans, rows, self.correct(plans), strict=True):
                row.correction = correction
                self.reading.read += keys_seen_at(plan.at, self.problem.sliding_window)
        self.reading.read = min(self.reading.read, self.reading.visible)

    def _end(self, span: Span) -> int:
        """The position after the last row that is not dense for being one of the last."""
        return span.end if self.decoding else max(span.position, span.end - self.tail)

    def _plan(self, span: Span, kept: Correction | None) -> Plan:
        end = self._end(span)
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

    # Mode `clusters`.

    def _blocks(self, span: Span, row: RowState) -> tuple[int, list[QueryBlock]]:
        """The query blocks of a span that leave keys out, as they were read, and the place of the first in the mask."""
        blocks = self.inner._blocks(span)
        if self.decoding and span.rows == 1 and row.selection is not None:  # the window's start may be an older one
            blocks = [self.inner._laid(span, row.selection.window)]
        covered = sum(block.middle <= self.inner.budget for block in blocks)
        return covered, blocks[covered:]

    def _complete(self, span: Span, row: RowState) -> None:
        """Correct the rows of one span, and keep with `row` what the next call goes on with."""
        t, (place, blocks) = tensors_of(self.problem, span, self.out, self.lse), self._blocks(span, row)
        if blocks:
            row.correction = self._correct_blocks(t, span, place, blocks, row.correction)
        end = self._end(span)
        if end < span.end:
            self.attend_tail(t, span, end)
        for block in blocks:  # dense rows read what the others leave out
            dense = sum(p >= end or p % self.gamma == 0 for p in range(block.first, block.last + 1))
            self.reading.read += dense * (block.middle - self.inner.budget) * self.config.block_k

    def _correct_blocks(
        self, t: Tensors, span: Span, place: int, blocks: list[QueryBlock], kept: Correction | None
    ) -> Correction:
        if kept is None or kept.clusters is None:
            assert t.lse is not None
            kept = Correction(-1, t.lse.new_zeros(*t.out.shape[:2], t.v.shape[2]), t.lse.new_zeros(t.lse.shape[:2]), 0.0)
            kept = replace(kept, clusters=Clusters(blocks[0].sink, t.k, t.v))
        assert kept.clusters is not None
        kept = replace(kept, clusters=kept.clusters.writable())
        assert kept.clusters is not None
        kept.clusters.extend(t.k, blocks[-1].window)
        at = anchors(blocks[0].first, span.end, self.gamma, known=blocks[0].first)
        dense = self.dense(t, span, at)
        done = 0
        for enough, run in alike(blocks):
            own = [p for p in at if run[0].first <= p <= run[-1].last]
            exact = tuple(x[:, :, done : done + len(own)] for x in dense)
            rows = slice(run[0].row, run[-1].row + run[-1].rows)
            index = torch.tensor(own, dtype=torch.long, device=t.q.device) - run[0].first
            estimated = self._estimated(t, span, rows, kept.clusters, place, run, enough)
            kept = _corrected(t, rows, estimated, index, exact, kept)
            place, done = place + len(run), done + len(own)
        return kept if not at else replace(kept, position=at[-1])

    def _estimated(
        self, t: Tensors, span: Span, rows: slice, clusters: Clusters, place: int, run: list[QueryBlock], enough: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of the rows of some query blocks with the estimate of what they miss, in fp32 at least."""
        assert t.lse is not None
        out, lse = t.out[:, :, rows].to(t.lse.dtype, copy=True), t.lse[:, :, rows]
        if not enough:
            return out, lse.clone()
        chosen = Chosen.of(self.inner.mask, span.batch, slice(place, place + len(run)), t.k.shape[0], run[0].low)
        left = clusters.left(t.k, t.v, run, chosen)
        return out, merge(out, lse, *estimate(t, run[0], len(run), left))


def _corrected(
    t: Tensors,
    rows: slice,
    estimated: tuple[torch.Tensor, ...],
    at: torch.Tensor,
    dense: tuple[torch.Tensor, ...],
    kept: Correction,
) -> Correction:
    """Write the rows `rows` of the span, output and log-sum-exp, corrected: of them, those at the indices `at` are anchors, whose
    dense attention is known. Returns what holds after them."""
    count = rows.stop - rows.start
    segment = torch.searchsorted(at, torch.arange(count, device=at.device), right=True)
    weights, weight = fading(len(at), kept.weight, estimated[1])
    latest = []
    for x, into, exact, before in zip(estimated, (t.out, t.lse), dense, (kept.out, kept.lse), strict=True):
        assert into is not None
        differences = torch.cat([before[:, :, None], exact - x[:, :, at]], dim=2)
        means = torch.einsum("an,hgn...->hga...", weights, differences)
        x += means[:, :, segment]
        x[:, :, at] = exact
        into[:, :, rows] = x
        latest.append(means[:, :, -1].clone())
    return replace(kept, out=latest[0], lse=latest[1], weight=weight)


def fading(count: int, weight: float, like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """How much the mean of before, of this weight, and `count` new differences weigh in the mean after none of them, after the
    first, and so on: `[count + 1, 1 + count]`, in dtype and device of `like`. And what the last mean weighs."""
    after = torch.arange(count + 1, dtype=torch.float64, device="cpu")
    age = after[:, None] - after
    weights = torch.where(age >= 0, DECAY ** age.clamp(min=0), 0.0)
    weights[:, 0] *= weight
    total = weights.sum(1, keepdim=True)
    return (weights / total.clamp(min=torch.finfo(total.dtype).tiny)).to(like), float(total[-1])


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
