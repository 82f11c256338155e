"""Dense attention of rows after others through PyTorch's fused attention."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_exact_as, assert_near, causal, eager, make_problem, make_qkv, small

from hip_hf import workers
from hip_hf.attention import attend
from hip_hf.backends.torch import block_sparse, fused
from hip_hf.cache.pages import BlockTable, PagedTensor, Store
from hip_hf.cache.pool import PagePool

pytestmark = pytest.mark.fast


@pytest.fixture
def heard(monkeypatch):
    """How often the fused attention is called; bf16 counts as fast."""
    calls = []
    monkeypatch.setattr(workers, "_fast_bf16", lambda: True)
    monkeypatch.setattr(
        fused,
        "fused_attention",
        lambda *args, own=fused.fused_attention, **more: calls.append(1) or own(*args, **more),
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(sinks=torch.linspace(-2, 3, 4)),
        dict(sliding_window=200),
        dict(key_start=[7, 70]),
    ],
)
def test_dense_rows_after_others(heard, dtype, given):
    q, k, v = make_qkv(131, 37, batch=2, dtype=dtype)
    result = attend(make_problem(q, k, v, **given), small(method="dense"), need_lse=True)
    assert len(heard) == 4  # of each sequence: what comes before its rows, and they themselves
    visible = causal(2, 37, 131, given.pop("key_start", None))
    given.pop("sliding_window", None)  # it is longer than the context
    assert_as_exact_as(result.out, q, k, v, visible, **given)
    want = eager(q, k, v, visible, **given)[1]
    assert_near(
        result.lse,
        want,
        2 * float((eager(q, k, v, visible, dtype=dtype, **given)[1] - want).abs().max()) + 1e-6,
    )


@pytest.mark.parametrize("given", [dict(softcap=20.0), dict(sliding_window=100)])
def test_dense_rows_that_it_does_not_know_go_without(heard, given):
    q, k, v = make_qkv(131, 37)
    result = attend(make_problem(q, k, v, **given), small(method="dense"))
    assert not heard
    visible = causal(1, 37, 131, sliding=given.get("sliding_window"))
    assert_as_exact_as(result.out, q, k, v, visible, softcap=given.get("softcap"))


def test_dense_rows_whose_keys_lie_in_pages(heard, monkeypatch):
    """They are brought together a few at a time."""
    monkeypatch.setattr(block_sparse, "KEYS_AT_ONCE", 40)
    q, k, v = make_qkv(131, 37)
    stores = [Store(x.shape[1], x.shape[3], x.dtype, x.device, 16) for x in (k, v)]
    pool, table = PagePool(*stores), BlockTable()
    pool.release(pool.allocate(20)[::2])  # so that a sequence lies in many pieces
    pool.append([table], 0, k, v)
    result = attend(
        make_problem(q, *(PagedTensor(store, [table], 131) for store in stores)),
        small(method="dense"),
    )
    assert len(heard) == 1 + 3  # 94 keys before the rows
    assert_as_exact_as(result.out, q, k, v, causal(1, 37, 131))


def test_dense_rows_whose_numbers_lie_apart(heard):
    q, k, v = (x.mT.contiguous().mT for x in make_qkv(131, 37))
    result = attend(make_problem(q, k, v), small(method="dense"))
    assert len(heard) == 2
    assert_as_exact_as(result.out, q, k, v, causal(1, 37, 131))


def test_dense_rows_do_not_feel_the_future(heard):
    q, k, v = make_qkv(131, 37)
    before = attend(make_problem(q, k, v), small(method="dense")).out
    k[:, :, 120:], v[:, :, 120:] = torch.inf, 1e30
    after = attend(make_problem(q, k, v), small(method="dense")).out
    assert len(heard) == 4
    assert torch.equal(after[:, :, :26], before[:, :, :26])
    assert not torch.equal(after[:, :, 26:], before[:, :, 26:])
