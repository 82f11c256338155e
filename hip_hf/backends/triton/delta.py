"""Delta correction (arXiv 2505.11254) on a GPU. Reference: `torch/delta.py`.

The anchors of all sequences are one launch of the prefill kernel at a stride. A second kernel
brings their differences to the rows, in place: output and log-sum-exp are read and written once,
and nothing as long as the prompt is allocated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hip_hf.backends.delta import DeltaCall
from hip_hf.backends.triton.attention.decode import decode_once
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import GridAndArguments, Part, dense_reads
from hip_hf.backends.triton.common.sequences import GROWING, Sequences, load_sequence
from hip_hf.backends.triton.common.tuning import power_of_two
from hip_hf.backends.triton.dense import operands, sequences_of
from hip_hf.geometry import Span
from hip_hf.state import Correction

if TYPE_CHECKING:
    from hip_hf.backends.delta import Plan

# Query rows of one program.
BLOCK_M = 32


@triton.jit(do_not_specialize=GROWING)
def spread_kernel(
    OUT, LSE, CHANGE, CHANGE_LSE, SEQUENCES,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt,
    stride_cs, stride_ch, stride_cn, stride_ds, stride_dh, stride_dn, stride_field, gamma,
    dim_v, BLOCK_M: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles of rows, Hq, sequences)`: add to every row of OUT `[B, Hq, Tq, Dv]` and LSE
    `[B, Hq, Tq]` the difference of its anchor, CHANGE fp32 `[S, Hq, slots, Dv]` and CHANGE_LSE
    fp32 `[S, Hq, slots]`.

    Slot 0 of the differences belongs to the anchor in front of the first position that `gamma`
    divides; slot n > 0 to the n-th such position.
    """
    head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, _, row_start, rows, position = load_sequence(SEQUENCES, stride_field, sequence)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    # the first position that gamma divides, and the last one, in units of it
    ahead = (position + gamma - 1) // gamma
    slot = tl.where(inside, (position + row) // gamma - ahead + 1, 0)
    dv = tl.arange(0, DV)
    change = CHANGE + sequence.to(tl.int64) * stride_cs + head * stride_ch
    change_lse = CHANGE_LSE + sequence.to(tl.int64) * stride_ds + head * stride_dh
    real = inside[:, None] & (dv < dim_v)[None, :]
    add = tl.load(
        change + slot.to(tl.int64)[:, None] * stride_cn + dv[None, :], mask=real, other=0.0
    )
    add_lse = tl.load(change_lse + slot * stride_dn, mask=inside, other=0.0)
    at = (row_start + row).to(tl.int64)
    out = (
        OUT
        + batch.to(tl.int64) * stride_ob
        + head * stride_oh
        + at[:, None] * stride_ot
        + dv[None, :]
    )
    tl.store(
        out,
        (tl.load(out, mask=real, other=0.0).to(tl.float32) + add).to(OUT.dtype.element_ty),
        mask=real,
    )
    lse = LSE + batch.to(tl.int64) * stride_lb + head * stride_lh + at * stride_lt
    tl.store(lse, tl.load(lse, mask=inside, other=0.0) + add_lse, mask=inside)


def spread_arguments(
    out: Tensor, lse: Tensor, change: Tensor, change_lse: Tensor, sequences: Sequences, gamma: int
) -> GridAndArguments:
    """Grid and arguments of `spread_kernel`: out `[B, Hq, Tq, Dv]`, lse fp32 `[B, Hq, Tq]`,
    differences fp32 `[S, Hq, n, Dv]` and `[S, Hq, n]`; `sequences` has the rows to correct."""
    arguments = dict(
        OUT=out, LSE=lse, CHANGE=change, CHANGE_LSE=change_lse, SEQUENCES=sequences.table,
        **dict(zip(("stride_ob", "stride_oh", "stride_ot"), out.stride(), strict=False)),
        **dict(zip(("stride_lb", "stride_lh", "stride_lt"), lse.stride(), strict=True)),
        **dict(zip(("stride_cs", "stride_ch", "stride_cn"), change.stride(), strict=False)),
        **dict(zip(("stride_ds", "stride_dh", "stride_dn"), change_lse.stride(), strict=True)),
        stride_field=sequences.table.stride(0), gamma=gamma, dim_v=out.shape[-1],
        BLOCK_M=BLOCK_M, DV=power_of_two(out.shape[-1]),
    )  # fmt: skip
    return (-(-sequences.max_rows // BLOCK_M), out.shape[1], sequences.count), arguments


class DeltaAttention(DeltaCall):
    """One call on a GPU: the other attention, the anchors, and what spreads their differences."""

    def correct(self, plans: list[Plan]) -> list[Correction | None]:
        problem, most = self.problem, max(len(self._aligned(plan)) for plan in plans)
        changes = self._empty(len(plans), problem.q.shape[1], 1 + most)
        self._leads(plans, *changes)
        if most:
            self._anchors(plans, *changes)
        spans = []
        for plan in plans:
            first = plan.span.position
            changed = bool(plan.at) or plan.kept is not None
            spans.append(plan.span.part(first, plan.end if changed else first))
        if any(span.rows for span in spans):
            assert self.lse is not None
            sequences = sequences_of(tuple(spans), self.out.device)
            grid, arguments = spread_arguments(self.out, self.lse, *changes, sequences, self.gamma)
            spread_kernel[grid](**arguments)
        kept: list[Correction | None] = []
        for s, plan in enumerate(plans):
            if plan.at:  # copies: a view would keep all of the prompt's differences
                last = (x[s, :, len(self._aligned(plan))].clone() for x in changes)
                out, lse = (x.unflatten(0, (-1, problem.groups)) for x in last)
                kept.append(Correction(plan.at[-1], out, lse))
            else:
                kept.append(plan.kept)
        return kept

    def _aligned(self, plan: Plan) -> list[int]:
        """The anchors at positions that `gamma` divides: all but the first row of a call."""
        return plan.at[1:] if plan.at and plan.at[0] % self.gamma else plan.at

    def _leads(self, plans: list[Plan], change: Tensor, change_lse: Tensor) -> None:
        """The difference that holds in front of the first aligned anchor, into slot 0: kept from
        the call before, or that of the first row."""
        own = [len(self._aligned(plan)) < len(plan.at) for plan in plans]
        if any(own):
            out, lse = self._first_rows(
                [plan.span for plan, first in zip(plans, own, strict=True) if first]
            )
        for s, (plan, first) in enumerate(zip(plans, own, strict=True)):
            batch, row = plan.span.batch, plan.span.row_start
            if first:
                assert self.lse is not None
                change[s, :, 0] = out[batch, :, 0] - self.out[batch, :, row]
                change_lse[s, :, 0] = lse[batch, :, 0] - self.lse[batch, :, row]
            elif plan.kept is not None:
                change[s, :, 0] = plan.kept.out.flatten(0, 1)
                change_lse[s, :, 0] = plan.kept.lse.flatten(0, 1)

    def _anchors(self, plans: list[Plan], change: Tensor, change_lse: Tensor) -> None:
        """The differences of the aligned anchors, into slots 1, 2, ...: one launch for all."""
        assert self.lse is not None
        aligned = [self._aligned(plan) for plan in plans]
        spans = []
        for plan, at in zip(plans, aligned, strict=True):
            first = plan.span.position
            spans.append(plan.span.part(at[0], at[-1] + 1) if at else plan.span.part(first, first))
        step = self.problem.q.shape[2] == 1  # its keys are many, so they are split over the device
        if step:
            one, one_lse = self._first_rows([span for span in spans if span.rows])
        else:
            part = Part(sequences_of(tuple(spans), self.out.device), dense_reads())
            into = operands(self.problem, change[:, :, 1:], change_lse[:, :, 1:])
            prefill(into, part, self.gamma)
        for s, (span, at) in enumerate(zip(spans, aligned, strict=True)):
            rows = slice(span.row_start, span.row_end, self.gamma)
            if step and at:
                change[s, :, 1:], change_lse[s, :, 1:] = one[span.batch], one_lse[span.batch]
            change[s, :, 1 : 1 + len(at)] -= self.out[span.batch, :, rows]
            change_lse[s, :, 1 : 1 + len(at)] -= self.lse[span.batch, :, rows]

    def _empty(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Room for outputs fp32 `[*shape, Dv]` and log-sum-exps fp32 `shape`."""
        options: Any = dict(dtype=torch.float32, device=self.out.device)
        return torch.empty(*shape, self.out.shape[3], **options), torch.empty(shape, **options)

    def _first_rows(self, spans: list[Span]) -> tuple[Tensor, Tensor]:
        """Dense attention of each span's first row: out fp32 `[B, Hq, 1, Dv]`, lse `[B, Hq, 1]`."""
        problem, q = self.problem, self.problem.q
        if q.shape[2] > 1:
            q = q.new_empty(q.shape[0], q.shape[1], 1, q.shape[3])
            for span in spans:
                q[span.batch, :, 0] = problem.q[span.batch, :, span.row_start]
        rows = [Span(x.batch, x.key_start, x.key_end, 0, 1, x.position) for x in spans]
        part = Part(sequences_of(tuple(rows), q.device), dense_reads(1))
        out, lse = self._empty(*q.shape[:3])
        decode_once(operands(replace(problem, q=q), out, lse), part, problem.longest)
        return out, lse
