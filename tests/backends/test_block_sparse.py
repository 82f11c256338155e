"""Attention of query blocks, torch backend: in one go, and with the logits of sink and window known
from before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hip_hf import workers
from hip_hf.backends.tensors import Tensors
from hip_hf.backends.torch.block_sparse import near_logits, near_lse, partial
from hip_hf.geometry import QueryBlock

GROUPS, SIZE, DIM = 3, 8, 16


def make_case(rows: int, count: int, sink: int, window: int, dtype: torch.dtype = torch.float64):
    """Tensors of two key heads, `count` query blocks of `rows` rows, and key blocks that they
    selected."""
    generator = torch.Generator().manual_seed(rows + window)
    first = 160
    end = first + rows * count
    q, k, v = (
        torch.randn(2, n, DIM, generator=generator, dtype=torch.float64)
        for n in (GROUPS * rows * count, end, end)
    )
    q = q.unflatten(1, (GROUPS, -1))
    blocks = [
        QueryBlock(
            i * rows, at, at + rows - 1, 0, sink, sink // SIZE, (at - window) // SIZE, at - window
        )
        for i, at in enumerate(range(first, end, rows))
    ]
    ids = torch.stack(
        [torch.randperm(10, generator=generator)[:4].sort().values + 3 for _ in range(2 * count)]
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return (
        Tensors(q, k, v, torch.empty_like(q), None, 0.3, None, None, None),
        blocks,
        ids.view(2, count, 4),
    )


def known_of(t: Tensors, blocks: list[QueryBlock]) -> torch.Tensor:
    return near_logits(t, blocks, SIZE, 4 * SIZE, range(blocks[0].rows))[0].clone()


@pytest.mark.parametrize(("rows", "count"), [(16, 3), (7, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize(("sink", "window"), [(16, 40), (0, 40), (16, 0), (0, 0)])
@pytest.mark.parametrize("given", [{}, {"softcap": 0.7}, {"sliding_window": 50}])
@pytest.mark.parametrize("need_lse", [True, False])
@pytest.mark.parametrize("selected", [True, False])
def test_known_logits_change_nothing(poison, rows, count, sink, window, given, need_lse, selected):
    t, blocks, ids = make_case(rows, count, sink, window)
    t = replace(t, **given)
    args = (t, blocks, ids if selected else None, SIZE, need_lse)
    want = [x if x is None else x.clone() for x in partial(*args)]
    got = partial(*args, known=known_of(t, blocks))
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("given", [{}, {"softcap": 0.7}, {"sliding_window": 50}])
def test_what_is_read_anyway_has_the_log_sum_exp_of_attention_to_it(given):
    t, blocks, _ = make_case(16, 3, 16, 40)
    t = replace(t, **given)
    want = partial(t, blocks, None, SIZE, True)[1]
    got = near_logits(t, blocks, SIZE, 0, range(16))[1]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    some = near_logits(t, blocks, SIZE, 0, range(1, 16, 2))[1].unflatten(2, (3, 16))
    assert some[..., ::2].isnan().all()
    torch.testing.assert_close(some[..., 1::2], got.unflatten(2, (3, 16))[..., 1::2])


@pytest.mark.parametrize(("sink", "window"), [(16, 40), (0, 40), (16, 0), (0, 0)])
@pytest.mark.parametrize("given", [{}, {"softcap": 0.7}, {"sliding_window": 30}])
def test_a_single_row_finds_the_same_where_the_keys_lie(poison, sink, window, given):
    t, (block,), _ = make_case(1, 1, sink, window)
    t = replace(t, **given)
    want = near_logits(t, [block], SIZE, 0, range(1))[1].clone()
    torch.testing.assert_close(near_lse(t, block), want, atol=1e-12, rtol=1e-12)


def test_some_heads_of_a_group_take_their_part_of_known_logits():
    t, blocks, ids = make_case(16, 3, 16, 40)
    known, part = known_of(t, blocks).chunk(GROUPS, dim=2)[1], t.part(slice(None), slice(1, 2))
    want = partial(part, blocks, ids, SIZE, True)[0].clone()
    got = partial(part, blocks, ids, SIZE, True, known=known)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_bf16_is_no_less_exact_with_known_logits(monkeypatch):
    monkeypatch.setattr(workers, "_fast_bf16", lambda: True)
    t, blocks, ids = make_case(16, 3, 16, 40, torch.bfloat16)
    exact = Tensors(*(x.double() for x in (t.q, t.k, t.v, t.out)), None, 0.3, None, None, None)
    want = partial(exact, blocks, ids, SIZE, False)[0].clone()
    at_once = partial(t, blocks, ids, SIZE, False)[0].clone()
    got = partial(t, blocks, ids, SIZE, False, known=known_of(t, blocks))[0]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, at_once)
    assert 0 < (got - want).abs().max() < 0.02


@pytest.mark.parametrize("worst", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_a_block_do_not_see_each_others_future(worst):
    t, blocks, ids = make_case(16, 2, 16, 40)
    before = partial(t, blocks, ids, SIZE, False, known=known_of(t, blocks))[0].clone()
    near = known_of(t, blocks)[..., 4 * SIZE :]
    at = blocks[1].first + 9
    t.k[:, at:] = worst
    t.v[:, at:] = 1e30
    known = known_of(t, blocks)
    assert not torch.equal(known[..., 4 * SIZE :], near)
    after = partial(t, blocks, ids, SIZE, False, known=known)[0]
    assert torch.equal(after[:, :, : blocks[1].row + 9], before[:, :, : blocks[1].row + 9])
    assert not torch.equal(after[:, :, blocks[1].row + 9 :], before[:, :, blocks[1].row + 9 :])
