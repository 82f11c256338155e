"""Gradients of block-sparse attention, torch backend. Memory stays O(T): weights are recomputed,
query block by query block.

Gradients flow through the keys and values that were read. The selection itself is a choice, not a
function of the tensors: nothing flows through it, as in HiP (arXiv 2406.09827, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hip_hf.backends.base import Piece
from hip_hf.geometry import QueryBlock
from hip_hf.methods.ranking import squash
from hip_hf.problem import AttentionProblem
from hip_hf.workers import LOGITS_AT_ONCE, run


def traced(
    problem: AttentionProblem,
    compute: Callable[[], None],
    out: Tensor,
    lse: Tensor | None,
    pieces: list[Piece] | None,
) -> tuple[Tensor, Tensor | None]:
    """Run `compute`, which fills out `[B, Hq, Tq, Dv]`, lse `[B, Hq, Tq]` and `pieces`; give out
    and lse as autograd is to know them. `pieces` None: nobody asks for gradients."""
    if pieces is None:
        compute()
        return out, lse
    return _Attention.apply(
        problem.q, problem.k, problem.v, problem.sinks, problem, compute, out, lse, pieces
    )


Gradient = Tensor | None  # None: it is zero, or not asked for


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_logits: Tensor | None,
        problem: AttentionProblem,
        compute: Callable[[], None],
        out: Tensor,
        lse: Tensor,
        pieces: list[Piece],
    ) -> tuple[Tensor, Tensor]:
        compute()
        pieces.sort(key=_place)  # as the workers finished: sums must not depend on that
        # of their own: autograd must not take them for inputs
        out, lse = out.view_as(out), lse.view_as(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.pieces, ctx.spans = pieces, problem.spans
        ctx.logits = (problem.scale, problem.sliding_window, problem.softcap)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Gradient, grad_lse: Gradient) -> tuple[Gradient, ...]:
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        scale, sliding_window, softcap = ctx.logits
        problem = AttentionProblem(q, k, v, ctx.spans, scale, sliding_window, softcap, sink_logits)
        grads = Gradients(problem, out, lse, grad_out, grad_lse)
        run(lambda head: grads.add(ctx.pieces, head), range(k.shape[1]), q.device)
        need = ctx.needs_input_grad
        summed = zip(need, (grads.q, grads.k, grads.v), strict=False)
        found = [x.to(q.dtype) if asked else None for asked, x in summed]
        return *found, grads.sink_logits().to(sink_logits.dtype) if need[3] else None, *[None] * 5


def _place(piece: Piece) -> tuple[int, ...]:
    span = piece.span
    return span.batch, span.row_start, piece.heads.start, piece.blocks[0].row


class Gradients:
    """Gradients of q, k, v `[B, heads, tokens, dim]` as they are summed up, in fp32 or float64."""

    def __init__(
        self,
        problem: AttentionProblem,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> None:
        self.problem, self.lse, self.grad_out = problem, lse, grad_out
        # the softmax's gradient subtracts from each weight's gradient their mean under the weights
        self.mean = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        if grad_lse is not None:
            self.mean = self.mean - grad_lse
        self.q, self.k, self.v = (
            torch.zeros_like(x, dtype=lse.dtype) for x in (problem.q, problem.k, problem.v)
        )

    def sink_logits(self) -> Tensor:
        """Gradient of the sink logits `[Hq]`: each has a weight, and a value of zero."""
        assert self.problem.sinks is not None
        total = torch.zeros_like(self.problem.sinks, dtype=self.lse.dtype)
        for span in self.problem.spans:
            rows = slice(span.row_start, span.row_end)
            sink_logits = self.problem.sinks.to(total.dtype)[:, None]
            weights = torch.exp(sink_logits - self.lse[span.batch, :, rows])
            total -= (weights * self.mean[span.batch, :, rows]).sum(-1)
        return total

    def add(self, pieces: list[Piece], head: int) -> None:
        """Everything of one key head."""
        groups = self.problem.groups
        for piece in pieces:
            if not piece.heads.start <= head < piece.heads.stop:
                continue
            masks_per_kv_head = 1 if piece.ids is None else piece.ids.shape[1]
            for mask in range(masks_per_kv_head):
                first = head * groups + mask
                heads = slice(first, first + groups // masks_per_kv_head)
                for i, block in enumerate(piece.blocks):
                    self._add(piece, block, head, heads, piece.positions(head, mask, i))

    def _add(
        self, piece: Piece, block: QueryBlock, head: int, heads: slice, positions: Tensor
    ) -> None:
        """One query block: `heads` are its query heads, `positions` the keys they read, each
        once."""
        problem, span = self.problem, piece.span
        count = min(block.rows, piece.rows - block.row)
        if count <= 0:
            return
        positions = positions.to(self.q.device)
        row = torch.arange(block.first, block.first + count, device=self.q.device)[:, None]
        rows = slice(span.row_start + block.row, span.row_start + block.row + count)
        at, dtype = (span.batch, heads, rows), self.lse.dtype
        q, grad_out = problem.q[at].to(dtype), self.grad_out[at].to(dtype)  # [G, rows, D]
        lse, mean = self.lse[at][..., None], self.mean[at][..., None]
        for part in positions.split(max(1, LOGITS_AT_ONCE // (q.shape[0] * count))):
            index = span.key_start + part
            of_head = (x[span.batch, head] for x in (problem.k, problem.v))
            k, v = (x.index_select(0, index).to(dtype) for x in of_head)
            logits = q @ k.T * problem.scale
            squash(logits, problem.softcap)
            hidden = part > row
            if problem.sliding_window is not None:
                hidden |= part <= row - problem.sliding_window
            weights = torch.exp(logits.masked_fill(hidden, -torch.inf) - lse)
            grad = weights * (grad_out @ v.T - mean)
            if problem.softcap is not None:  # times the slope of the squashing
                grad = grad * (1 - (logits / problem.softcap).square())
            grad = grad * problem.scale
            self.q[at] += grad @ k
            # each key once in a call, so the order of the sums is that of the calls
            self.k[span.batch, head].index_add_(0, index, torch.einsum("grn,grd->nd", grad, q))
            of_values = torch.einsum("grn,grd->nd", weights, grad_out)
            self.v[span.batch, head].index_add_(0, index, of_values)
