"""A paged cache's keys on the kernels: read where they lie, or by the torch backend with a
reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_batch, make_model
from helpers import assert_near, make_problem, make_qkv, small
from interpreter import DEVICE
from paging import PAGE, token_major

import hip_hf
from hip_hf.attention import Result, attend
from hip_hf.backends.triton.dense import keys_of
from hip_hf.cache.pages import BlockTable, PagedTensor, Store
from hip_hf.cache.pool import PagePool
from hip_hf.integration import patched_forward as forward
from hip_hf.integration.attention_function import attention_forward
from hip_hf.state import DecodeState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

NEAR = 2e-5


def own_pages(k: torch.Tensor, v: torch.Tensor, pages: int) -> tuple[PagedTensor, PagedTensor]:
    """In a pool of ours, `[Hkv, tokens, D]`, whose first pages are taken; other pages hold NaN."""
    stores = [Store(x.shape[1], x.shape[3], x.dtype, torch.device(DEVICE), PAGE) for x in (k, v)]
    pool = PagePool(*stores)
    free = pool.allocate(pages)
    for store in stores:
        store.arenas[0].fill_(torch.nan)
    pool.release(free[1:-1:2] + free[2::2])
    tables = [BlockTable() for _ in k]
    pool.append(tables, 0, k.to(DEVICE), v.to(DEVICE))
    return tuple(PagedTensor(store, tables, k.shape[2]) for store in stores)  # type: ignore[return-value]


def call(
    q: torch.Tensor, k: Any, v: Any, state: DecodeState | None = None, **fields: Any
) -> Result:
    triton = fields["backend"] == "triton"
    problem = make_problem(
        *(x.to(DEVICE) if triton and not isinstance(x, PagedTensor) else x for x in (q, k, v)),
        [0, 13],
    )
    return attend(problem, small(decode_refresh=3, **fields), None, state, need_lse=True)


@pytest.mark.parametrize("paged", [own_pages, token_major])
@pytest.mark.parametrize(
    "fields", [dict(), dict(dense_tail=9), dict(method="streaming"), dict(delta=11)]
)
def test_pages_give_what_contiguous_keys_give(paged: Any, fields: dict[str, Any]) -> None:
    """Two rows of a batch, one with padding: a prompt, and steps on what it left."""
    q, k, v = make_qkv(90, batch=2, dv=24)
    states = DecodeState(), DecodeState()
    for first, end in ((0, 87), (87, 88), (88, 89), (89, 90)):
        if fields.get("dense_tail") and end > 87:
            break
        pages = paged(k[:, :, :end], v[:, :, :end], 20)
        got = call(q[:, :, first:end], *pages, states[0], backend="triton", **fields)
        want = call(
            q[:, :, first:end], k[:, :, :end], v[:, :, :end], states[1], backend="torch", **fields
        )
        assert (got.path, got.reason) == ("sparse", "")
        assert_near(got.out.cpu(), want.out, NEAR)
        assert_near(got.lse.cpu(), want.lse, NEAR, "lse")  # type: ignore[union-attr]


def test_nothing_is_copied() -> None:
    _, k, v = make_qkv(50, batch=2)
    for paged in (own_pages, token_major):
        pages = paged(k, v, 12)
        kv = keys_of(make_problem(torch.zeros(2, 4, 1, 16, device=DEVICE), *pages))
        for x, tensor in zip((kv.k, kv.v), pages, strict=True):
            assert x.data_ptr() == tensor.store.arenas[0].data_ptr()
            assert x.shape[1:] == (PAGE, 2, 16)


def test_pages_in_several_pieces_go_to_torch_with_a_reason() -> None:
    """The cache grows into a second arena between two steps: the torch backend goes on, and selects
    anew."""
    q, k, v = make_qkv(97, heads=1)
    stores = [Store(1, 16, torch.float32, torch.device(DEVICE), PAGE) for _ in "kv"]
    pool, table = PagePool(*stores), BlockTable()
    pool.append([table], 0, k[:, :, :96].to(DEVICE), v[:, :, :96].to(DEVICE))
    state = DecodeState()

    def step(first: int, end: int, backend: str) -> Result:
        pages = (PagedTensor(store, [table], end) for store in stores)
        problem = make_problem(q[:, :, first:end].to(DEVICE), *pages)
        return attend(problem, small(backend=backend), None, state)

    step(0, 95, "triton")
    step(95, 96, "triton")
    assert state.rows[0].on_device
    pool.append([table], 96, k[:, :, 96:].to(DEVICE), v[:, :, 96:].to(DEVICE))
    assert len(stores[0].arenas) == 2
    with pytest.raises(ValueError, match="not one piece of device memory"):
        step(96, 97, "triton")
    got = step(96, 97, "torch")
    assert state.device is None
    assert not state.rows[0].on_device
    assert state.rows[0].selection is not None
    assert state.rows[0].selection.position == 96, "it read on by a selection of the kernels"
    want = attend(make_problem(q[:, :, 96:], k, v), small(backend="torch"), None, DecodeState())
    assert_near(got.out.cpu(), want.out, NEAR)


def test_a_cache_in_one_piece_grows_on_the_kernels() -> None:
    """Its arena is replaced between two steps: the kernels go on with what they keep."""
    q, k, v = make_qkv(PAGE * 6 + 3, heads=1)
    stores = [Store(1, 16, torch.float32, torch.device(DEVICE), PAGE) for _ in "kv"]
    pool, table, first = PagePool(*stores, one_piece=True), BlockTable(), PAGE * 6 - 3
    state, twin = DecodeState(), DecodeState()
    arenas = set()
    for at, end in ((0, first), *((i, i + 1) for i in range(first, k.shape[2]))):
        pool.append([table], at, k[:, :, at:end].to(DEVICE), v[:, :, at:end].to(DEVICE))
        if end == first:  # leave room for nothing more than the last page
            pool.allocate(len(pool.free))
        pages = (PagedTensor(store, [table], end) for store in stores)
        got = attend(
            make_problem(q[:, :, at:end].to(DEVICE), *pages), small(backend="triton"), None, state
        )
        want = attend(
            make_problem(q[:, :, at:end], k[:, :, :end], v[:, :, :end]),
            small(backend="torch"),
            None,
            twin,
        )
        assert (got.path, got.reason) == ("sparse", "")
        assert_near(got.out.cpu(), want.out, NEAR)
        arenas.add(stores[0].arenas[0].data_ptr())
    assert len(arenas) == 2
    assert state.rows[0].on_device


def test_patched_layers_call_the_kernels_without_the_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once these have served the cache; to the bit what the interface gives."""
    model = make_model("llama", backend="triton", decode_refresh=2).to(DEVICE)
    ids, asked, outs = make_batch([84])["input_ids"].to(DEVICE), [], []

    def interface(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[1].shape[2])
        return attention_forward(*args, **kwargs)

    monkeypatch.setattr(forward, "attention_forward", interface)
    for patched in (False, True):
        if patched:
            hip_hf.patch(model)
        with torch.no_grad():
            cache = model(ids[:, :80], use_cache=True).past_key_values
            outs.append(
                torch.cat(
                    [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(80, 84)],
                    1,
                )
            )
        assert {(row.path, row.reason, row.cache) for row in hip_hf.explain(model)} == {
            ("sparse", "", "pages")
        }
    assert torch.equal(*outs)
    assert asked == [80, 80], "two layers: the prompt alone goes by the interface"


def test_hyper_attention_reads_no_pages() -> None:
    q, k, v = make_qkv(60)
    with pytest.raises(ValueError, match="hyper has no kernels for keys and values in pages"):
        attend(
            make_problem(q.to(DEVICE), *own_pages(k, v, 8)), small(backend="triton", method="hyper")
        )
