"""Dense rows on a GPU, and how the kernels are told of a call's tensors and spans."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from hip_hf.backends.triton.attention.backward import Part, attention
from hip_hf.backends.triton.attention.decode import Scratch, decode, splits_for
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.addressing import KeyValues
from hip_hf.backends.triton.common.arguments import Logits, dense_reads
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.cache.pages import PagedTensor
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# Spans whose descriptors stay on the device: a forward pass asks for the same ones in every layer.
KEPT_DESCRIPTORS = 16


@lru_cache(maxsize=KEPT_DESCRIPTORS)
def sequences_of(spans: tuple[Span, ...], device: torch.device) -> Sequences:
    with torch.inference_mode(False):
        return Sequences.of(spans, device)


def logits_of(problem: AttentionProblem) -> Logits:
    return Logits(
        problem.scale, problem.softcap, problem.sliding_window, problem.sinks, problem.positions
    )


def keys_of(problem: AttentionProblem) -> KeyValues:
    """Keys and values of a call: contiguous, or pages in one piece of memory (`unsupported` says
    where they are not)."""
    if not isinstance(problem.k, PagedTensor) or not isinstance(problem.v, PagedTensor):
        return KeyValues(problem.k, problem.v)
    k, v = problem.k.store.pages(), problem.v.store.pages()
    assert k is not None
    assert v is not None
    return KeyValues(k, v, problem.k.block_table())


def dense_rows(
    problem: AttentionProblem,
    kv: KeyValues,
    spans: tuple[Span, ...],
    tails: list[int],
    logits: Logits,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """The rows from `tails` on of each span, densely, their keys split over the device: they are
    few and their keys are many."""
    q, reads = problem.q, dense_reads()
    left = [
        span.part(span.position + at, span.end)
        for span, at in zip(spans, tails, strict=True)
        if at < span.rows
    ]
    most = max(span.rows for span in left)
    splits = splits_for(q, problem.k.shape[1], len(left), problem.longest, most, reads.block_q)
    if splits == 1:
        prefill(q, kv, sequences_of(tuple(left), q.device), reads, logits, out, lse)
        return
    # a launch for those that begin at the same row: scratch for all would have room for the rows
    # between them, too
    for first in sorted({span.row_start for span in left}):
        some = tuple(
            replace(span, row_start=0, row_end=span.rows)
            for span in left
            if span.row_start == first
        )
        rows = slice(first, first + most)
        scratch = Scratch.make(splits, q[:, :, rows], problem.v.shape[3])
        sequences = sequences_of(some, q.device)
        decode(
            q[:, :, rows],
            kv,
            sequences,
            reads,
            logits,
            scratch,
            out[:, :, rows],
            None if lse is None else lse[:, :, rows],
        )


def attend_densely(
    problem: AttentionProblem, config: HiPConfig, out: torch.Tensor, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention, into out and lse, or into new ones where autograd follows; the keys of few
    rows are split over the device. `config`: the settings of the call, as in
    `backward.attention`."""
    with torch.cuda.device_of(problem.q):
        kv, logits = keys_of(problem), logits_of(problem)
        if problem.needs_grad:
            part = Part(sequences_of(problem.spans, problem.q.device), dense_reads())
            out, learnt = attention(problem.q, problem.k, problem.v, logits, (part,), config)
            return out, None if lse is None else learnt
        dense_rows(problem, kv, problem.spans, [0] * len(problem.spans), logits, out, lse)
    return out, lse
