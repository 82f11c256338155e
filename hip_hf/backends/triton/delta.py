"""Delta correction (arXiv 2505.11254) on a GPU. Reference: `torch/delta.py`.

The anchors of all sequences are one launch of the prefill kernel at a stride. A second kernel
brings their differences to the rows, in place: output and log-sum-exp are read and written once,
and nothing as long as the prompt is allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hip_hf.backends.delta import DeltaCall
from hip_hf.backends.triton.attention.decode import decode_once
from hip_hf.backends.triton.attention.prefill import strided_rows
from hip_hf.backends.triton.common.arguments import dense_reads
from hip_hf.backends.triton.common.sequences import GROWING, Sequences, load_sequence
from hip_hf.backends.triton.common.tuning import power_of_two
from hip_hf.backends.triton.dense import dense_rows, keys_of, logits_of, sequences_of
from hip_hf.geometry import Span
from hip_hf.state import Correction

if TYPE_CHECKING:
    from hip_hf.backends.delta import Plan
    from hip_hf.backends.tensors import Tensors

# Query rows of one program.
BLOCK_M = 32


@triton.jit(do_not_specialize=GROWING)
def spread_kernel(
    OUT, LSE, CHANGE, CHANGE_LSE, SEQUENCES,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt,
    stride_cs, stride_ch, stride_cn, stride_ds, stride_dh, stride_dn, stride_sequences, gamma, dim_v,
    BLOCK_M: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles of rows, Hq, sequences)`: add to every row the difference of its anchor.

    Slot 0 of the differences belongs to the anchor in front of the first position that `gamma`
    divides; slot n > 0 to the n-th such position.
    """
    head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, _, row_start, rows, position = load_sequence(SEQUENCES, stride_sequences, sequence)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    ahead = (
        position + gamma - 1
    ) // gamma  # the first position that gamma divides, and the last one, in units of it
    slot = tl.where(inside, (position + row) // gamma - ahead + 1, 0)
    dv = tl.arange(0, DV)
    change = CHANGE + sequence.to(tl.int64) * stride_cs + head * stride_ch
    change_lse = CHANGE_LSE + sequence.to(tl.int64) * stride_ds + head * stride_dh
    real = inside[:, None] & (dv < dim_v)[None, :]
    more = tl.load(
        change + slot.to(tl.int64)[:, None] * stride_cn + dv[None, :], mask=real, other=0.0
    )
    more_lse = tl.load(change_lse + slot * stride_dn, mask=inside, other=0.0)
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
        (tl.load(out, mask=real, other=0.0).to(tl.float32) + more).to(OUT.dtype.element_ty),
        mask=real,
    )
    lse = LSE + batch.to(tl.int64) * stride_lb + head * stride_lh + at * stride_lt
    tl.store(lse, tl.load(lse, mask=inside, other=0.0) + more_lse, mask=inside)


def spread_arguments(
    out: torch.Tensor, lse: torch.Tensor, change: torch.Tensor, change_lse: torch.Tensor, sequences: Sequences,
    gamma: int,
) -> tuple[tuple[int, int, int], dict[str, Any]]:  # fmt: skip
    """Grid and arguments of `spread_kernel`: out `[B, Hq, Tq, Dv]`, lse fp32 `[B, Hq, Tq]`,
    differences fp32 `[S, Hq, n, Dv]` and `[S, Hq, n]`; `sequences` has the rows to correct."""
    arguments = dict(
        OUT=out, LSE=lse, CHANGE=change, CHANGE_LSE=change_lse, SEQUENCES=sequences.table,
        **dict(zip(("stride_ob", "stride_oh", "stride_ot"), out.stride(), strict=False)),
        **dict(zip(("stride_lb", "stride_lh", "stride_lt"), lse.stride(), strict=True)),
        **dict(zip(("stride_cs", "stride_ch", "stride_cn"), change.stride(), strict=False)),
        **dict(zip(("stride_ds", "stride_dh", "stride_dn"), change_lse.stride(), strict=True)),
        stride_sequences=sequences.table.stride(0), gamma=gamma, dim_v=out.shape[-1],
        BLOCK_M=BLOCK_M, DV=power_of_two(out.shape[-1]),
    )  # fmt: skip
    return (-(-sequences.max_rows // BLOCK_M), out.shape[1], sequences.count), arguments


class DeltaAttention(DeltaCall):
    """One call on a GPU: the other attention's launches, one for the anchors, one that spreads
    their differences."""

    def dense(self, t: Tensors, span: Span, at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        problem = self.problem
        if not at:
            shape = (*t.q.shape[:2], 0)
            return t.out.new_empty(*shape, t.out.shape[3], dtype=torch.float32), t.out.new_empty(
                shape, dtype=torch.float32
            )
        if problem.q.shape[2] == 1:
            out, lse = (x[span.batch] for x in self._first_rows([span]))
        else:
            rows, shape = (
                sequences_of((span.part(at[0], at[-1] + 1),), self.out.device),
                (1, problem.q.shape[1], len(at)),
            )
            outs = torch.empty(
                *shape, self.out.shape[3], dtype=torch.float32, device=self.out.device
            )
            lses = torch.empty(shape, dtype=torch.float32, device=self.out.device)
            strided_rows(
                problem.q, keys_of(problem), rows, logits_of(problem), self.gamma, outs, lses
            )
            out, lse = outs[0], lses[0]
        return out.unflatten(0, (-1, problem.groups)), lse.unflatten(0, (-1, problem.groups))

    def attend_tail(self, t: Tensors, span: Span, end: int) -> None:
        tails = [end - span.position]
        dense_rows(
            self.problem,
            keys_of(self.problem),
            (span,),
            tails,
            logits_of(self.problem),
            self.out,
            self.lse,
        )

    def correct(self, plans: list[Plan]) -> list[Correction | None]:
        problem, gamma = self.problem, self.gamma
        aligned = [plan.at[1:] if plan.at and plan.at[0] % gamma else plan.at for plan in plans]
        shape = (len(plans), problem.q.shape[1], 1 + max(map(len, aligned)))
        change = torch.empty(*shape, self.out.shape[3], dtype=torch.float32, device=self.out.device)
        change_lse = torch.empty(shape, dtype=torch.float32, device=self.out.device)
        leading = self._leads(plans, aligned, change, change_lse)
        if shape[2] > 1:
            self._anchors(plans, aligned, change, change_lse)
        used = [lead or bool(at) for lead, at in zip(leading, aligned, strict=True)]
        spans = tuple(
            plan.span.part(plan.span.position, plan.end if some else plan.span.position)
            for plan, some in zip(plans, used, strict=True)
        )
        if any(span.rows for span in spans):
            sequences = sequences_of(spans, self.out.device)
            grid, arguments = spread_arguments(
                self.out, self.lse, change, change_lse, sequences, gamma
            )
            spread_kernel[grid](**arguments)
        kept: list[Correction | None] = []
        for s, (plan, at) in enumerate(zip(plans, aligned, strict=True)):
            if plan.at:  # copies: a view would keep all of the prompt's differences
                last = (
                    x[s, :, len(at)].clone().unflatten(0, (-1, problem.groups))
                    for x in (change, change_lse)
                )
                kept.append(Correction(plan.at[-1], *last))
            else:
                kept.append(plan.kept)
        return kept

    def _leads(
        self,
        plans: list[Plan],
        aligned: list[list[int]],
        change: torch.Tensor,
        change_lse: torch.Tensor,
    ) -> list[bool]:
        """The difference that holds in front of the first of `aligned`, into slot 0: kept from the
        call before, or that of the first row. Returns for which of the plans there is one."""
        first = [
            bool(plan.at) and plan.at[0] not in at[:1]
            for plan, at in zip(plans, aligned, strict=True)
        ]
        if any(first):
            out, lse = self._first_rows(
                [plan.span for plan, own in zip(plans, first, strict=True) if own]
            )
        for s, (plan, own) in enumerate(zip(plans, first, strict=True)):
            span = plan.span
            if own:
                change[s, :, 0] = out[span.batch, :, 0] - self.out[span.batch, :, span.row_start]
                change_lse[s, :, 0] = (
                    lse[span.batch, :, 0] - self.lse[span.batch, :, span.row_start]
                )
            elif plan.kept is not None:
                change[s, :, 0] = plan.kept.out.flatten(0, 1)
                change_lse[s, :, 0] = plan.kept.lse.flatten(0, 1)
        return [own or plan.kept is not None for plan, own in zip(plans, first, strict=True)]

    def _first_rows(self, spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of the first row of each span: out fp32 `[B, Hq, 1, Dv]` and lse
        `[B, Hq, 1]`."""
        problem, q = self.problem, self.problem.q
        if q.shape[2] > 1:
            q = q.new_empty(q.shape[0], q.shape[1], 1, q.shape[3])
            for span in spans:
                q[span.batch, :, 0] = problem.q[span.batch, :, span.row_start]
        out = torch.empty(*q.shape[:3], self.out.shape[3], dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        rows = tuple(
            Span(span.batch, span.key_start, span.key_end, 0, 1, span.position) for span in spans
        )
        sequences = sequences_of(rows, q.device)
        decode_once(
            q,
            keys_of(problem),
            sequences,
            dense_reads(1),
            logits_of(problem),
            problem.longest,
            out,
            lse,
        )
        return out, lse

    def _anchors(
        self,
        plans: list[Plan],
        aligned: list[list[int]],
        change: torch.Tensor,
        change_lse: torch.Tensor,
    ) -> None:
        """The differences at the positions `aligned`, into slots 1, 2, ...: one launch for all of
        them."""
        problem, gamma, out, lse = self.problem, self.gamma, self.out, self.lse
        spans = tuple(
            plan.span.part(at[0], at[-1] + 1)
            if at
            else plan.span.part(plan.span.position, plan.span.position)
            for plan, at in zip(plans, aligned, strict=True)
        )
        step = problem.q.shape[2] == 1  # its keys are many, so they are split over the device
        if step:
            one, one_lse = self._first_rows([span for span in spans if span.rows])
        else:
            kv, sequences = keys_of(problem), sequences_of(spans, out.device)
            strided_rows(
                problem.q,
                kv,
                sequences,
                logits_of(problem),
                gamma,
                change[:, :, 1:],
                change_lse[:, :, 1:],
            )
        for s, (span, at) in enumerate(zip(spans, aligned, strict=True)):
            rows = slice(span.row_start, span.row_end, gamma)
            if step and at:
                change[s, :, 1:], change_lse[s, :, 1:] = one[span.batch], one_lse[span.batch]
            change[s, :, 1 : 1 + len(at)] -= out[span.batch, :, rows]
            change_lse[s, :, 1 : 1 + len(at)] -= lse[span.batch, :, rows]
