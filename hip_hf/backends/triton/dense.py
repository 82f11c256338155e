"""Dense rows on a GPU, and how the kernels are told of a call's tensors and spans."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.backends.triton.attention.backward import attend_with_gradients
from hip_hf.backends.triton.attention.decode import DecodeScratch, decode, splits_for
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, dense_reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.cache.pages import PagedTensor
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# Spans whose descriptors stay on the device: a forward pass asks for the same ones in every layer.
KEPT_DESCRIPTORS = 16


@lru_cache(maxsize=KEPT_DESCRIPTORS)
def sequences_of(spans: tuple[Span, ...], device: torch.device) -> Sequences:
    """Return the descriptors of a call's spans on `device`. They are kept for the layers that ask
    for the same spans."""
    with torch.inference_mode(False):
        return Sequences.of(spans, device)


def keys_of(problem: AttentionProblem) -> KeyValues:
    """Keys and values of a call: contiguous, or pages in one piece of memory (`unsupported` says
    where they are not)."""
    if not isinstance(problem.k, PagedTensor) or not isinstance(problem.v, PagedTensor):
        return KeyValues(problem.k, problem.v)
    k, v = problem.k.store.pages(), problem.v.store.pages()
    assert k is not None
    assert v is not None
    return KeyValues(k, v, problem.k.block_table())


def operands(problem: AttentionProblem, out: Tensor, lse: Tensor | None = None) -> Operands:
    """Return a call's tensors as the kernels take them. The results are to be written into out
    `[B, Hq, Tq, Dv]` and lse fp32 `[B, Hq, Tq]`."""
    rest = (problem.softcap, problem.sliding_window, problem.sinks, problem.positions)
    return Operands(problem.q, keys_of(problem), Logits(problem.scale, *rest), out, lse)


def dense_rows(x: Operands, spans: tuple[Span, ...], tails: list[int], longest: int) -> None:
    """The rows from `tails` on of each span, densely, their keys (`longest` at most) split over the
    device: they are few and their keys are many."""
    q, reads, dim_v = x.q, dense_reads(), x.kv.v.shape[-1]
    left = [
        span.part(span.position + at, span.end)
        for span, at in zip(spans, tails, strict=True)
        if at < span.rows
    ]
    most = max(span.rows for span in left)
    splits = splits_for(q, x.kv.heads, len(left), longest, most, reads.block_q)
    if splits == 1:
        prefill(x, Part(sequences_of(tuple(left), q.device), reads))
        return
    # a launch for those that begin at the same row: scratch for all would have room for the rows
    # between them, too
    for first in sorted({span.row_start for span in left}):
        same = [span for span in left if span.row_start == first]
        some = tuple(replace(span, row_start=0, row_end=span.rows) for span in same)
        q, out = (whole[:, :, first : first + most] for whole in (x.q, x.out))
        lse = None if x.lse is None else x.lse[:, :, first : first + most]
        part = Part(sequences_of(some, q.device), reads)
        decode(Operands(q, x.kv, x.logits, out, lse), part, DecodeScratch.make(splits, q, dim_v))


def attend_densely(
    problem: AttentionProblem, config: HiPConfig, out: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Dense attention, into out `[B, Hq, Tq, Dv]` and lse fp32 `[B, Hq, Tq]`, or into new tensors
    where autograd follows; the keys of few rows are split over the device. `config`: the settings
    of the call, as in `backward.attend_with_gradients`."""
    with torch.cuda.device_of(problem.q):
        x = operands(problem, out, lse)
        if problem.needs_grad:
            part = Part(sequences_of(problem.spans, problem.q.device), dense_reads())
            out, learnt = attend_with_gradients(x, (part,), config)
            return out, None if lse is None else learnt
        dense_rows(x, problem.spans, [0] * len(problem.spans), problem.longest)
    return out, lse
