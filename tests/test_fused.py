"""Attention of query blocks through PyTorch's fused attention: the same as `block_sparse.partial`, and what bf16 prompts take."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_exact_as, assert_near, causal, eager, make_problem, make_qkv, small

import hip_hf
from hip_hf import HiPConfig
from hip_hf.attention import attend
from hip_hf.cache.pool import PagePool
from hip_hf.methods.base import QueryBlock
from hip_hf.paged import BlockTable, PagedTensor, Store
from hip_hf.reference import block_sparse, fused, workers
from hip_hf.reference.block_sparse import Tensors

GROUPS, SIZE, DIM = 3, 8, 16
ALL = slice(None)


def make_case(rows: int, count: int, sink: int, window: int, dtype: torch.dtype = torch.float64):
    """Tensors of two key heads, `count` query blocks of `rows` rows, and key blocks that they selected."""
    generator = torch.Generator().manual_seed(rows + window)
    first = 160
    end = first + rows * count
    q, k, v = (torch.randn(2, n, DIM, generator=generator, dtype=torch.float64) for n in (GROUPS * rows * count, end, end))
    q = q.unflatten(1, (GROUPS, -1))
    blocks = [
        QueryBlock(i * rows, at, at + rows - 1, 0, sink, sink // SIZE, (at - window) // SIZE, at - window)
        for i, at in enumerate(range(first, end, rows))
    ]
    ids = torch.stack([torch.randperm(10, generator=generator)[:4].sort().values + 3 for _ in range(2 * count)])
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return Tensors(q, k, v, torch.empty_like(q), None, 0.3, None, None, None), blocks, ids.view(2, count, 4)


@pytest.fixture
def heard(monkeypatch):
    """How often the fused attention is called; bf16 counts as fast."""
    calls = []
    monkeypatch.setattr(workers, "_fast_bf16", lambda: True)
    monkeypatch.setattr(fused, "attention", lambda *args, own=fused.attention, **more: calls.append(1) or own(*args, **more))
    return calls


@pytest.fixture
def served(monkeypatch, heard):
    """Every dtype goes through the fused attention; how often it is called."""
    monkeypatch.setattr(fused, "serves", lambda t, block: True)
    return heard


@pytest.mark.parametrize(("rows", "count"), [(16, 3), (7, 1), (2, 2)])
@pytest.mark.parametrize(("sink", "window"), [(16, 40), (0, 40), (16, 0), (0, 0)])
@pytest.mark.parametrize(("selected", "near"), [(True, True), (True, False), (False, True)])
def test_it_gives_what_partial_gives(served, rows, count, sink, window, selected, near):
    t, blocks, ids = make_case(rows, count, sink, window)
    args = (t, slice(0, 2), ALL, blocks, ids if selected else None, SIZE, True, near)
    want = [x.clone() for x in block_sparse.partial(*args)]
    got = fused.partial(*args)
    assert len(served) == (count if selected else 0) + (1 if near and window else 0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_bf16_is_no_less_exact(served):
    t, blocks, ids = make_case(16, 3, 16, 40, torch.bfloat16)
    exact = Tensors(*(x.double() for x in (t.q, t.k, t.v, t.out)), None, 0.3, None, None, None)
    want, want_lse = (x.clone() for x in block_sparse.partial(exact, slice(0, 2), ALL, blocks, ids, SIZE, True))
    old, old_lse = (x.clone() for x in block_sparse.partial(t, slice(0, 2), ALL, blocks, ids, SIZE, True))
    got, got_lse = fused.partial(t, slice(0, 2), ALL, blocks, ids, SIZE, True)
    assert served
    assert (got - want).abs().max() <= (old - want).abs().max()
    assert (got_lse - want_lse).abs().max() <= (old_lse - want_lse).abs().max()


@pytest.mark.parametrize("worst", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_a_block_do_not_see_each_others_future(served, worst):
    t, blocks, ids = make_case(16, 2, 16, 40)
    args = (slice(0, 2), ALL, blocks, ids, SIZE, True)
    before = fused.partial(t, *args)[0].clone()
    at = blocks[1].first + 9
    t.k[:, at:] = worst
    t.v[:, at:] = 1e30
    after = fused.partial(t, *args)[0]
    assert served
    assert torch.equal(after[:, :, : blocks[1].row + 9], before[:, :, : blocks[1].row + 9])
    assert not torch.equal(after[:, :, blocks[1].row + 9 :], before[:, :, blocks[1].row + 9 :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prompts_in_bf16_take_it_and_others_do_not(heard, dtype):
    """Also where the processor has no instructions for bf16, which only a real run asks for."""
    q, k, v = (torch.randn(1, heads, 700, 32, generator=torch.Generator().manual_seed(heads)).to(dtype) for heads in (4, 2, 2))
    config = HiPConfig(budget=64, window=64, sink=16, dense_below=0, dense_tail=0, dense_layers=0)
    got = hip_hf.hip_attention(q, k, v, config=config)
    assert bool(heard) == (dtype == torch.bfloat16)
    assert got.isfinite().all()


@pytest.mark.parametrize("field", [{"softcap": 20.0}, {"sliding_window": 400}])
def test_what_it_does_not_know_goes_without(monkeypatch, field):
    monkeypatch.setattr(workers, "_fast_bf16", lambda: True)
    monkeypatch.setattr(fused, "attention", lambda *args, **more: pytest.fail("the fused attention was called"))
    q, k, v = (torch.randn(1, heads, 700, 32, generator=torch.Generator().manual_seed(heads)).bfloat16() for heads in (4, 2, 2))
    config = HiPConfig(budget=64, window=64, sink=16, dense_below=0, dense_tail=0, dense_layers=0)
    assert hip_hf.hip_attention(q, k, v, config=config, **field).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "given", [dict(), dict(sinks=torch.linspace(-2, 3, 4)), dict(sliding_window=200), dict(key_start=[7, 70])]
)
def test_dense_rows_after_others(heard, dtype, given):
    q, k, v = make_qkv(131, 37, batch=2, dtype=dtype)
    result = attend(make_problem(q, k, v, **given), small(method="dense"), need_lse=True)
    assert len(heard) == 4  # of each sequence: what comes before its rows, and they themselves
    visible = causal(2, 37, 131, given.pop("key_start", None))
    given.pop("sliding_window", None)  # it is longer than the context
    assert_as_exact_as(result.out, q, k, v, visible, **given)
    want = eager(q, k, v, visible, **given)[1]
    assert_near(result.lse, want, 2 * float((eager(q, k, v, visible, dtype=dtype, **given)[1] - want).abs().max()) + 1e-6)


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
    result = attend(make_problem(q, *(PagedTensor(store, [table], 131) for store in stores)), small(method="dense"))
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
