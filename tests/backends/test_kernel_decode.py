"""Split-K decode against the torch reference on the same block indices: interpreted, or native on a
GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_cases import run, scratch_for, step
from helpers import assert_near
from interpreter import DEVICE
from kernel_cases import check, make_case, spans_of

from hip_hf.backends.triton.attention.decode import decode, splits_for
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import Part, dense_reads
from hip_hf.geometry import QueryBlock, Span, make_query_block

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("groups", [1, 2, 4, 7, 8])
def test_query_heads_of_a_group(groups: int) -> None:
    run(step(groups=groups))


@pytest.mark.parametrize(
    ("splits", "dtype"),
    [
        (1, torch.float16),
        (1, torch.float32),
        (2, torch.bfloat16),
        (16, torch.float32),
        (16, torch.float16),
    ],
)
def test_dtypes_and_splits(dtype: torch.dtype, splits: int) -> None:
    run(step(dtype=dtype), splits)


@pytest.mark.parametrize(("dim", "dv"), [(80, 80), (96, 48), (128, 128), (192, 128), (256, 256)])
def test_head_dims(dim: int, dv: int) -> None:
    run(step(dim=dim, dv=dv))


@pytest.mark.parametrize(("shared", "page_size"), [(True, 0), (True, 48), (False, 0), (False, 16)])
def test_several_rows_and_pages(shared: bool, page_size: int) -> None:
    run(
        make_case(spans_of((0, 200, 5), (31, 100, 5), (7, 3, 3)), per_row=True, shared=shared),
        page_size=page_size,
    )


@pytest.mark.fast
@pytest.mark.parametrize("fields", [dict(softcap=2.0), dict(sliding_window=70), dict(sinks=True)])
def test_logits(fields: dict[str, Any]) -> None:
    run(step(**{**fields, **({"sinks": torch.randn(4)} if fields.get("sinks") else {})}))


def test_a_window_kept_between_refreshes() -> None:
    """The window's start is what the caller says, and the sink ends there at the latest."""
    case = step()
    windows = [176, 16]

    def kept(span: Span) -> list[QueryBlock]:
        start = windows[case.spans.index(span)]
        return [make_query_block(case.config, 0, span.position, span.position, start, None)]

    case.blocks = kept  # type: ignore[method-assign]
    for at, span in enumerate(case.spans):
        (block,) = kept(span)
        count = min(3, block.num_candidates)
        case.counts[at], case.indices[at, :, 0, :count] = (
            count,
            torch.arange(block.low, block.low + count).int(),
        )
    out, lse = case.empty()
    reads = case.reads(windows=torch.tensor(windows, dtype=torch.int32, device=DEVICE)[:, None])
    decode(case.operands(out, lse), case.part(reads), scratch_for(case, 4))
    check(case, out, lse, case.reference())


@pytest.mark.parametrize("rows", [1, 3])
def test_dense_decode(rows: int) -> None:
    case = make_case(spans_of((0, 330, rows), (60, 201, rows)), per_row=True)
    case.config = type(case.config)(block_q=1, sink=0, window=1 << 20)
    case.counts.zero_()
    out, lse = case.empty()
    decode(case.operands(out, lse), case.part(dense_reads(1)), scratch_for(case, 8))
    check(case, out, lse, case.dense_reference())


def test_dense_tail_of_a_prompt() -> None:
    """Many rows, split over the keys: the same tile as prefill."""
    case = make_case(spans_of((0, 230, 40)))
    (out, lse), (want, want_lse) = case.empty(), case.empty()
    part = case.part(dense_reads(64))
    decode(case.operands(out, lse), part, scratch_for(case, 4))
    prefill(case.operands(want, want_lse), part)
    assert_near(out, want, 1e-6)
    assert_near(lse, want_lse, 1e-6)


def test_lengths_are_read_on_the_device() -> None:
    """A captured step must serve the next one: same arguments, only what the tensors hold has
    changed."""
    case = step()
    sequences = case.sequences()
    fixed = replace(sequences, max_keys=1 << 20)
    reads, (out, lse), scratch = case.reads(), case.empty(), scratch_for(case, 4)
    x, part = case.operands(out, lse), Part(fixed, reads)
    decode(x, part, scratch)
    check(case, out, lse, case.reference())
    shorter = [
        replace(span, key_end=span.key_end - 33, position=span.position - 33) for span in case.spans
    ]
    case.spans = shorter
    case.counts.clamp_(max=2)
    for i in range(2):
        case.indices[:, :, :, i] = i + 2
    fixed.table.copy_(case.sequences().table)
    reads.counts.copy_(case.counts)
    reads.indices.copy_(case.indices)
    decode(x, part, scratch)
    check(case, out, lse, case.reference())


def test_splits_for_occupies_the_device() -> None:
    q = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    assert splits_for(q, 8, 1, 64) == 1
    assert splits_for(q, 8, 1, 1664) in (16, 32), (
        "an H200 has 132 processors, 8 key heads leave most of them idle"
    )
    assert splits_for(q, 8, 1, 1 << 20) <= 64
    assert splits_for(q, 8, 512, 1664) == 1
