"""The backward kernels on one case, against the torch reference and autograd."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers import assert_near, eager
from interpreter import DEVICE
from kernel_cases import Case, make_case, precisions, spans_of

from hip_hf.backends.base import Piece
from hip_hf.backends.torch.backward import Gradients
from hip_hf.backends.triton.attention.backward import attend_with_gradients
from hip_hf.backends.triton.common.arguments import Logits, Operands
from hip_hf.backends.triton.common.sequences import KeyValues
from hip_hf.config import HiPConfig


def operands(qkv: list[torch.Tensor], logits: Logits) -> Operands:
    """Of attention that makes its own output."""
    q, k, v = qkv
    return Operands(q, KeyValues(k, v), logits, out=q)


def reference(
    case: Case,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """Gradients of q, k, v (and sinks) by the torch reference, in `dtype`."""
    problem = case.problem(dtype)
    out, lse = case.reference(dtype)
    outside = ~case.visible().any(-1).expand(lse.shape)
    out, lse = out.masked_fill(outside[..., None], 0.0), lse.masked_fill(outside, -torch.inf)
    grads = Gradients(
        problem, out, lse, grad_out.to(dtype), None if grad_lse is None else grad_lse.to(dtype)
    )
    per_head = case.indices.shape[1] // case.k.shape[1]
    size = case.groups // per_head
    for at, span in enumerate(case.spans):
        for i, block in enumerate(case.blocks(span)):
            for one in range(case.indices.shape[1]):
                ids = case.chosen(at, one * size, i)
                head = slice(one // per_head, one // per_head + 1)
                piece = Piece(
                    span, head, [block], ids[None, None, None], case.config.block_k, span.rows
                )
                grads._add(
                    piece,
                    block,
                    head.start,
                    slice(one * size, (one + 1) * size),
                    piece.positions(head.start, 0, 0),
                )
    return [
        grads.q,
        grads.k,
        grads.v,
        *([grads.sink_logits()] if problem.sinks is not None else []),
    ]


def plain(
    case: Case, dtype: torch.dtype, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> list[torch.Tensor]:
    """The same by autograd through plain attention in `dtype`."""
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in (case.q, case.k, case.v)]
    fields = dict(softcap=case.fields.get("softcap"))
    if "sinks" in case.fields:
        fields["sinks"] = case.fields["sinks"].to(dtype, copy=True).requires_grad_()
        inputs.append(fields["sinks"])
    visible = case.visible()
    out, lse = eager(*inputs[:3], visible, scale=case.scale, dtype=dtype, **fields)
    total = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        total = total + (lse * grad_lse.to(dtype))[visible.any(-1).expand(lse.shape)].sum()
    return list(torch.autograd.grad(total, inputs))


def one_prompt(dim: int, dv: int) -> Case:
    """A prompt without padding, with head dims."""
    return make_case(spans_of((0, 71, 71)), heads=1, dim=dim, dv=dv, window=16)


def run(case: Case, need_lse: bool = True) -> None:
    visible = case.visible().any(-1).expand(case.q.shape[:3])
    grad_out = torch.randn(*case.q.shape[:3], case.v.shape[-1]).to(case.q.dtype)
    grad_lse = torch.randn(case.q.shape[:3]) * visible if need_lse else None
    inputs = [x.to(DEVICE, copy=True).requires_grad_() for x in (case.q, case.k, case.v)]
    logits = case.logits()
    if logits.sinks is not None:
        logits = replace(logits, sinks=logits.sinks.clone().requires_grad_())
        inputs.append(logits.sinks)
    out, lse = attend_with_gradients(operands(inputs[:3], logits), (case.part(),), HiPConfig())
    assert (out[~visible] == 0).all()
    assert (lse[~visible] == -torch.inf).all()
    total = (out * grad_out.to(DEVICE)).sum()
    if grad_lse is not None:
        total = total + (lse * grad_lse.to(DEVICE))[visible.to(DEVICE)].sum()
    got = torch.autograd.grad(total, inputs)
    want = reference(case, grad_out, grad_lse)
    exact = plain(case, torch.float64, grad_out, grad_lse)
    # two PyTorch computations in the case's dtype: through the weights, and, as kernels do, from
    # the output and lse
    rough = []
    for precision in precisions(case.q, case.q.shape[-1], case.v.shape[-1]):
        with precision:
            rough.append(plain(case, case.q.dtype, grad_out, grad_lse))
            if case.q.dtype == torch.float32 and not getattr(
                precision, "random", None
            ):  # slow: in the usual order alone
                rough.append(reference(case, grad_out, grad_lse, torch.float32))
    for i, (name, a, b) in enumerate(zip(("q", "k", "v", "sinks"), got, want, strict=False)):
        error = max(float((grads[i].double() - exact[i]).abs().max()) for grads in rough)
        least = torch.finfo(case.q.dtype).eps * float(exact[i].abs().max())
        assert_near(a.cpu(), b, 2 * max(error, least), f"gradient of {name}")
