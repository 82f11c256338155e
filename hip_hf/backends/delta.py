"""Delta correction (arXiv 2505.11254): compute what sparse attention misses densely for every
`gamma`-th row only, the *anchors*, and make use of it in the rows after it. S: sparse, by any
method; D: dense.

`step`, as published: the difference is added to the rows up to the next anchor, which rests on its
changing slowly.

    out[i] = S[i] + (D[j] - S[j]),   j = gamma * floor(i / gamma)

`clusters`: where what is missed depends on the query, it is another one in the next row. So every
row first estimates its own missing part from clusters of keys (`clusters.py`), which gives E; the
anchors correct what is left, by a mean over the latest of them, for what is left is mostly noise:

    out[i] = E[i] + mean of (D[j] - E[j]) over anchors j <= i; each weighs 15/16 of the next

Anchors are the positions that `gamma` divides; in `step` also the first row of a call. They get D
itself. The last `gamma` rows of a prefill call are dense. Decode goes on alike: a step at an anchor
is dense, and what the next ones need is kept with the cache. The log-sum-exp is corrected alike.
Costs `1 / gamma` of dense attention, `clusters` also as much as a hundred keys more for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.backends.base import BlockSparseCall, Executor, MakeExecutor
from hip_hf.backends.clusters import Chosen, Clusters, alike, estimate
from hip_hf.backends.keys_read import Count, blocks_of
from hip_hf.backends.tensors import Tensors, merge, tensors_of
from hip_hf.geometry import keys_seen_at, rows_of_blocks
from hip_hf.methods.base import selects
from hip_hf.state import Correction, RowState

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.geometry import QueryBlock, Span
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
    adds dense attention of single rows. There are no gradients. A log-sum-exp is made where none is
    given."""

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
        self.mode, self.shortfall = mode_of(config, problem.sliding_window)
        clusters = self.mode == "clusters"
        tail = max(config.dense_tail, self.gamma)
        # the correction must not come twice
        inner = replace(config, delta=None, dense_tail=0 if clusters else tail)
        need_mask = self.need_mask or clusters
        self.inner = self.attention(problem, inner, self.out, self.lse, need_mask)
        self.mask = self.inner.mask if self.need_mask else None
        self.at: list[list[int]] = []  # mode `step`: the anchors of each span

    @property
    def count(self) -> Count:
        if self.mode == "step":
            return partial(with_anchors, self.inner.count, self.at, self.problem.sliding_window)
        inner, spans = self.selecting, self.problem.spans
        told = (self.config, inner.budget, spans, inner.windows, self.decoding)
        return partial(with_the_rest, inner.count, *told, [self._end(span) for span in spans])

    def dense(self, t: Tensors, span: Span, at: list[int]) -> tuple[Tensor, Tensor]:
        """Dense attention of a span's rows at the anchors `at`, `gamma` apart: output
        `[Hkv, G, n, Dv]` and log-sum-exp `[Hkv, G, n]`, in fp32 at least."""
        raise NotImplementedError

    def attend_tail(self, t: Tensors, span: Span, end: int) -> None:
        """Dense attention of a span's rows from position `end` on."""
        raise NotImplementedError

    def correct(self, plans: list[Plan]) -> list[Correction | None]:
        """Correct the rows of every plan; the corrections that hold after their last rows."""
        raise NotImplementedError

    def run(self, state: DecodeState | None) -> None:
        self.inner.run(state)
        spans = self.problem.spans
        rows = [RowState(0) if state is None else state.rows[span.batch] for span in spans]
        if self.mode == "clusters":
            for span, row, window in zip(spans, rows, self.selecting.windows, strict=True):
                self._complete(span, row, window)
        else:
            kept = [row.correction for row in rows]
            plans = [self._plan(*pair) for pair in zip(spans, kept, strict=True)]
            self.at = [plan.at for plan in plans]
            for row, correction in zip(rows, self.correct(plans), strict=True):
                row.correction = correction

    def tail(self, span: Span) -> int:
        """As `Executor.tail`. The next call goes on with what the anchors in the last rows say,
        once that is known."""
        last = max(self.config.dense_tail, self.gamma)
        return span.rows if self.decoding else max(0, span.rows - last)

    def _end(self, span: Span) -> int:
        """The position after the last row that is not dense for being one of the last."""
        return span.position + self.tail(span)

    def _plan(self, span: Span, kept: Correction | None) -> Plan:
        end = self._end(span)
        at = anchors(span.position, end, self.gamma, None if kept is None else kept.position)
        return Plan(span, end, at, None if at and at[0] == span.position else kept)

    # Mode `clusters`.

    @property
    def selecting(self) -> BlockSparseCall:
        """What is corrected: in this mode it selects key blocks."""
        assert isinstance(self.inner, BlockSparseCall)
        return self.inner

    def _blocks(self, span: Span, window: int | None) -> tuple[int, list[QueryBlock]]:
        """The query blocks of a span that leave keys out, as they were read, and the place of the
        first in the mask."""
        blocks = self.selecting._blocks(span, window)
        covered = sum(block.num_candidates <= self.selecting.budget for block in blocks)
        return covered, blocks[covered:]

    def _complete(self, span: Span, row: RowState, window: int | None) -> None:
        """Correct the rows of one span, and keep with `row` what the next call goes on with."""
        t = tensors_of(self.problem, span, self.out, self.lse)
        place, blocks = self._blocks(span, window)
        if blocks:
            row.correction = self._correct_blocks(t, span, place, blocks, row.correction)
        end = self._end(span)
        if end < span.end:
            self.attend_tail(t, span, end)

    def _correct_blocks(
        self, t: Tensors, span: Span, place: int, blocks: list[QueryBlock], kept: Correction | None
    ) -> Correction:
        if kept is None or kept.clusters is None:
            assert t.lse is not None
            lse = t.lse.new_zeros(t.lse.shape[:2])
            out = t.lse.new_zeros(*lse.shape, t.v.shape[2])
            kept = Correction(-1, out, lse, 0.0, Clusters(blocks[0].sink_end, t.k, t.v))
        assert isinstance(kept.clusters, Clusters)
        clusters = kept.clusters.writable()
        clusters.extend(t.k, blocks[-1].window_start)
        kept = replace(kept, clusters=clusters)
        at = anchors(blocks[0].first, span.end, self.gamma, known=blocks[0].first)
        dense = self.dense(t, span, at)
        done = 0
        for enough, run in alike(blocks):
            own = [p for p in at if run[0].first <= p <= run[-1].last]
            exact = tuple(x[:, :, done : done + len(own)] for x in dense)
            rows = rows_of_blocks(run)
            index = torch.tensor(own, dtype=torch.long, device=t.q.device) - run[0].first
            estimated = self._estimated(t, span, clusters if enough else None, place, run)
            kept = _corrected(t, rows, estimated, index, exact, kept)
            place, done = place + len(run), done + len(own)
        return kept if not at else replace(kept, position=at[-1])

    def _estimated(
        self, t: Tensors, span: Span, clusters: Clusters | None, place: int, run: list[QueryBlock]
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rows of some query blocks, whose first is at `place` in the
        mask, with the estimate of what they miss (None: without), in fp32 at least."""
        assert t.lse is not None
        rows, places = rows_of_blocks(run), slice(place, place + len(run))
        out, lse = t.out[:, :, rows].to(t.lse.dtype, copy=True), t.lse[:, :, rows]
        if clusters is None:
            return out, lse.clone()
        assert self.inner.mask is not None
        chosen = Chosen.of(self.inner.mask, span.batch, places, t.k.shape[0], run[0].low)
        left = clusters.left(t.k, t.v, run, chosen)
        return out, merge(out, lse, *estimate(t, run[0], len(run), left))


def with_anchors(count: Count, at: list[list[int]], sliding: int | None) -> tuple[float, float]:
    """Keys read and keys in sight where the rows at the positions `at` read all keys besides."""
    read, visible = count()
    return min(read + sum(keys_seen_at(some, sliding) for some in at), visible), visible


def with_the_rest(
    count: Count,
    config: HiPConfig,
    budget: int,
    spans: Sequence[Span],
    windows: Sequence[int | None],
    decoding: bool,
    ends: Sequence[int],
) -> tuple[float, float]:
    """Keys read and keys in sight where anchors, and a span's rows from its end in `ends` on, read
    what the other rows leave out besides."""
    assert config.delta is not None
    read, visible = count()
    for span, window, end in zip(spans, windows, ends, strict=True):
        for block in blocks_of(config, span, decoding, None, window):
            rows = range(block.first, block.last + 1)
            dense = sum(p >= end or p % config.delta == 0 for p in rows)
            read += dense * max(0, block.num_candidates - budget) * config.block_k
    return min(read, visible), visible


def _corrected(
    t: Tensors,
    rows: slice,
    estimated: tuple[Tensor, ...],
    at: Tensor,
    dense: tuple[Tensor, ...],
    kept: Correction,
) -> Correction:
    """Write the rows `rows` of the span, output and log-sum-exp, corrected: of them, those at the
    indices `at` are anchors, whose dense attention is known. Returns what holds after them."""
    index = torch.arange(rows.stop - rows.start, device=at.device)
    segment = torch.searchsorted(at, index, right=True)
    weights, weight = fading(len(at), kept.weight, estimated[1])
    latest, both = [], (estimated, (t.out, t.lse), dense, (kept.out, kept.lse))
    for x, into, exact, before in zip(*both, strict=True):
        assert into is not None
        differences = torch.cat([before[:, :, None], exact - x[:, :, at]], dim=2)
        means = torch.einsum("an,hgn...->hga...", weights, differences)
        x += means[:, :, segment]
        x[:, :, at] = exact
        into[:, :, rows] = x
        latest.append(means[:, :, -1].clone())
    return replace(kept, out=latest[0], lse=latest[1], weight=weight)


def fading(count: int, weight: float, like: Tensor) -> tuple[Tensor, float]:
    """Return the weights `[count + 1, 1 + count]`, in dtype and device of `like`, of means whose
    older parts weigh less: row `n` is the mean after `n` of the `count` new differences. Column 0
    weighs the mean from before, whose total weight was `weight`; column `i` weighs the `i`-th new
    difference. The total weight of the last mean is returned as well."""
    after = torch.arange(count + 1, dtype=torch.float64, device="cpu")
    age = after[:, None] - after
    weights = torch.where(age >= 0, DECAY ** age.clamp(min=0), 0.0)
    weights[:, 0] *= weight
    total = weights.sum(1, keepdim=True)
    return (weights / total.clamp(min=torch.finfo(total.dtype).tiny)).to(like), float(total[-1])
