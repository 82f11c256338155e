"""PyTorch's own attention where kernels are not trusted on a GPU: what it is given, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_near, causal, eager, make_problem, make_qkv
from paging import token_major

from hip_hf import attention
from hip_hf.attention import attend_dense
from hip_hf.backends import sdpa
from hip_hf.backends.torch import dense
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.problem import AttentionProblem


def test_grouped_heads_that_pytorch_would_give_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, with values of another width, or before Ampere, it has none for groups of heads on a
    GPU but the plain one."""

    def takes(
        dtype: torch.dtype, dim: int, dim_v: int, capability: tuple[int, int] = (9, 0)
    ) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        q, v = (
            SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 1, 1, width))
            for width in (dim, dim_v)
        )
        return sdpa.takes_groups(q, v)

    assert takes(torch.bfloat16, 128, 128)
    assert not takes(torch.float32, 128, 128)
    assert not takes(torch.bfloat16, 192, 128)
    assert not takes(torch.bfloat16, 512, 512)
    assert not takes(torch.float16, 128, 128, (7, 5))
    for rows in (40, 1):
        q, k, v = make_qkv(40, rows, batch=2, heads=2, groups=3)
        want = dense.grouped_sdpa(q, k, v, 0.3, rows > 1)
        with monkeypatch.context() as patch:
            patch.setattr(sdpa, "takes_groups", lambda q, v: False)
            assert_near(dense.grouped_sdpa(q, k, v, 0.3, rows > 1), want, 1e-6)


@pytest.mark.parametrize("window", [None, 37, 1000])
@pytest.mark.parametrize(
    ("rows", "at_once"), [(70, 1 << 27), (70, 5000), (200, 5000), (1, 1 << 27)]
)
def test_chunks_and_windows_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, rows: int, at_once: int, window: int | None
) -> None:
    monkeypatch.setattr(dense, "LOGITS_ON_GPU", at_once)
    q, k, v = make_qkv(200, rows, batch=2, dv=8)
    problem = make_problem(q, k, v, sliding_window=window)
    assert_near(
        dense.sdpa(problem, problem.spans[0]),
        eager(q, k, v, causal(2, rows, 200, sliding=window))[0],
    )


def test_no_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window, no more rows than it has keys."""
    seen: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, attn_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(tuple(attn_mask.shape))
        return real(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(dense, "LOGITS_ON_GPU", 2 * 2 * 400 * 30)
    q, k, v = make_qkv(400, 100, batch=2)
    for window, shapes in (
        (None, {(30, 330), (30, 360), (30, 390), (10, 400)}),
        (80, {(30, 109), (10, 89)}),
    ):
        seen.clear()
        problem = make_problem(q, k, v, sliding_window=window)
        dense.sdpa(problem, problem.spans[0])
        assert set(seen) == shapes


# Of 160 keys and the last 100 rows.
SPANS = {
    "left padding": (Span(0, 0, 160, 0, 100, 60), Span(1, 81, 160, 21, 100, 0)),
    "packed": (
        Span(0, 0, 80, 0, 30, 50),
        Span(0, 80, 160, 30, 100, 10),
        Span(1, 0, 160, 0, 100, 60),
    ),
}


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("pages", [False, True])
def test_every_kind_of_batch_equals_block_by_block(
    monkeypatch: pytest.MonkeyPatch, pages: bool, spans: str, window: int | None
) -> None:
    """Padding, packed sequences, and pages that lie between one another's; rows that belong to no
    span stay zero."""
    q, k, v = make_qkv(160, 100, batch=2, dv=8)
    problem = replace(make_problem(q, k, v, sliding_window=window), spans=SPANS[spans])
    want, _ = attend_dense(problem, HiPConfig(method="dense"), False)
    if pages:
        pages_of_k, pages_of_v = token_major(k, v, 30)
        problem = replace(problem, k=pages_of_k, v=pages_of_v)
        assert not all(dense._in_one_piece(problem, span) for span in problem.spans)
    asked: list[AttentionProblem] = []

    def takes_masks(given: AttentionProblem) -> bool:
        asked.append(given)
        return True

    monkeypatch.setattr(attention, "takes_masks", takes_masks)
    monkeypatch.setattr(dense, "attend_rows", lambda *_: pytest.fail("block by block"))
    got, lse = attend_dense(problem, HiPConfig(method="dense"), False)
    assert_near(got, want)
    assert lse is None
    assert asked == [problem]


def test_who_is_given_masks() -> None:
    """On a GPU; not where gradients are kept, nor where a cache is offloaded, nor a CPU, which has
    fused attention."""
    _, k, v = make_qkv(40)
    keys, _ = token_major(k, v, 10)

    def takes(device: str, resident: bool = True, learning: bool = False) -> bool:
        keys.store.resident = resident
        q: Any = SimpleNamespace(device=torch.device(device), requires_grad=learning)
        return attention.takes_masks(AttentionProblem(q, keys, keys, (), 1.0))

    assert takes("cuda")
    assert not takes("cpu")
    assert not takes("cuda", resident=False)
    assert not takes("cuda", learning=True)
