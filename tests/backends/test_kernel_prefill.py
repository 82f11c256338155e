"""The prefill kernel against the torch reference on the same block indices: interpreted, or native
on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near
from interpreter import DEVICE
from kernel_cases import check, make_case, spans_of
from prefill_cases import large_logits, run

from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import dense_reads
from hip_hf.geometry import Span

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [
        (1, torch.bfloat16),
        (2, torch.float32),
        (4, torch.float16),
        (7, torch.bfloat16),
        (7, torch.float32),
        (8, torch.float16),
    ],
)
def test_query_heads_of_a_group_and_dtypes(groups: int, dtype: torch.dtype) -> None:
    run(make_case(groups=groups, dtype=dtype))


@pytest.mark.parametrize(
    ("dim", "dv"), [(80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 40), (16, 64)]
)
def test_head_dims(dim: int, dv: int) -> None:
    run(make_case(spans_of((0, 83, 83)), heads=1, dim=dim, dv=dv, window=16, dtype=torch.float16))


@pytest.mark.parametrize(("shared", "page_size"), [(True, 0), (True, 16), (False, 0), (False, 48)])
def test_padding_and_pages(shared: bool, page_size: int) -> None:
    # the second row has padding in front of its keys, the third is short; queries continue a cache
    spans = [Span(0, 0, 150, 0, 60, 90), Span(1, 37, 150, 0, 60, 53), Span(2, 11, 41, 30, 60, 0)]
    run(make_case(spans, shared=shared), page_size)


def test_packed_sequences() -> None:
    spans = [Span(0, 0, 70, 0, 70, 0), Span(0, 70, 71, 70, 71, 0), Span(0, 71, 160, 71, 160, 0)]
    run(make_case(spans, rows=163, tokens=163))


@pytest.mark.fast
@pytest.mark.parametrize(
    "fields",
    [
        dict(softcap=2.0),
        dict(sliding_window=70),
        dict(sinks=True),
        dict(softcap=3.0, sliding_window=25, sinks=True),
    ],
)
def test_logits(fields: dict[str, Any]) -> None:
    sinks = {"sinks": torch.randn(4)} if fields.get("sinks") else {}
    run(make_case(spans_of((0, 121, 100)), **{**fields, **sinks}))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(block_q=64, sink=0, window=0),
        dict(block_q=7, block_k=4, sink=3, window=9),
        dict(block_q=150, block_k=16),
        dict(block_q=1, block_k=8, sink=8, window=8),
        dict(block_k=5, sink=7, window=11),
        dict(sink=400),
        dict(window=400),
    ],
)
def test_block_sizes(sizes: dict[str, int]) -> None:
    run(make_case(spans_of((0, 101, 87)), heads=1, **sizes), need_lse=False)


def test_scale_and_large_logits() -> None:
    run(large_logits())


def test_dense_rows() -> None:
    case = make_case(spans_of((0, 130, 70), (9, 121, 70)))
    case.config = type(case.config)(block_q=16, sink=0, window=1 << 20)
    case.counts.zero_()
    out, lse = case.empty()
    prefill(case.operands(out, lse), case.part(dense_reads()))
    check(case, out, lse, case.dense_reference())


@pytest.mark.parametrize(
    ("stride", "fields"), [(2, {}), (7, {}), (7, dict(sliding_window=50)), (2, dict(softcap=2.0))]
)
def test_strided_rows_are_dense_attention_of_those_rows(
    stride: int, fields: dict[str, Any]
) -> None:
    case = make_case(spans_of((0, 130, 90), (50, 80, 80)), rows=90, **fields)
    most = -(-90 // stride)
    out = torch.full((2, 4, most, 64), torch.nan, device=DEVICE)
    lse = torch.full((2, 4, most), torch.nan, device=DEVICE)
    prefill(case.operands(out, lse), case.part(dense_reads()), stride)
    case.config = type(case.config)(block_q=16, sink=0, window=1 << 20)
    tolerance, lse_tolerance = case.tolerances(case.visible())
    wanted = case.dense_reference()
    for at, span in enumerate(case.spans):
        rows = range(span.row_start, span.row_end, stride)
        assert_near(out[at, :, : len(rows)].cpu(), wanted[0][span.batch, :, list(rows)], tolerance)
        assert_near(
            lse[at, :, : len(rows)].cpu(),
            wanted[1][span.batch, :, list(rows)],
            lse_tolerance,
            "lse",
        )
        assert out[at, :, len(rows) :].isnan().all(), (
            "rows that the sequence does not have were written"
        )


def test_later_query_blocks_change_nothing() -> None:
    case = make_case()
    first, _ = case.empty()
    prefill(case.operands(first, None), case.part())
    for x in (case.q, case.k, case.v):
        x[:, :, 96:] = torch.randn_like(x[:, :, 96:])
    second, _ = case.empty()
    prefill(case.operands(second, None), case.part())
    assert torch.equal(first[:, :, :96], second[:, :, :96])
    assert not torch.equal(first[:, :, 96:], second[:, :, 96:])
