"""Memory: the sparse path allocates O(T) in prefill, and nothing that grows with T in a decode step
on a kept state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import allocations
from families import make_model
from helpers import make_problem, make_qkv

import hip_hf
from hip_hf import workers
from hip_hf.attention import attend, hip_attention
from hip_hf.backends.torch import block_sparse
from hip_hf.backends.torch import sparse as sparse_module
from hip_hf.config import HiPConfig
from hip_hf.state import DecodeState

SHORT, LONG = 16384, 32768
# of a call's own tensors a token takes 64 bytes in q and 64 in k or v (2 query heads, 1 key head,
# D=16, fp32)
BYTES_PER_TOKEN = 128


@pytest.fixture(autouse=True)
def in_this_thread(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch mode sees its own thread only; and buffers kept from before would hide what a call
    needs."""
    threads(1)
    monkeypatch.setattr(workers.scratch, "buffers", {})


def test_the_meter_counts_storages_and_no_views() -> None:
    x = torch.zeros(1000)
    seen = allocations(lambda: x.view(10, 100).expand(5, 10, 100)[0].T)
    assert (seen.largest, seen.total) == (0, 0)
    into = torch.empty(1000)
    assert allocations(lambda: torch.mul(x, 2, out=into)).largest == 0
    assert allocations(lambda: x.add_(1)).largest == 0
    assert allocations(lambda: x[None] * torch.ones(7, 1)).largest == 28000


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that wait for a selection take a buffer of a size that no context changes: here a
    small one, beside which what grows shows."""
    monkeypatch.setattr(block_sparse, "NEAR_AT_ONCE", 1 << 20)


def test_logits_that_wait_take_no_more_than_their_buffer() -> None:
    config = HiPConfig(dense_below=0, dense_tail=0)
    q, k, v = make_qkv(LONG // 2, heads=1)
    sizes = []
    real = block_sparse.near_logits

    def noted(*args: Any) -> Any:
        logits, lse = real(*args)
        sizes.append((len(logits), logits.nbytes))
        return logits, lse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_module, "near_logits", noted)
        hip_attention(q, k, v, config=config)
    assert max(count for count, _ in sizes) > 1
    assert max(size for _, size in sizes) <= block_sparse.NEAR_AT_ONCE


@pytest.mark.parametrize(
    ("fields", "dense_tail"),
    [
        (dict(), 0),
        (dict(), 64),
        (dict(rescore=2, group_shared=False, query_stride=64), 0),
        (dict(representative="middle"), 0),
        (dict(method="streaming"), 0),
    ],
)
def test_prefill_allocates_a_constant_per_token(
    fields: dict, dense_tail: int, small_buffers: None
) -> None:
    """Outputs, pyramid, buffers: the largest of them, and all that was ever allocated, freed or
    not, per token."""
    sizes = dict(
        budget=128, window=128, block_q=256, query_stride=32, dense_below=0, dense_tail=dense_tail
    )
    config = HiPConfig(**{**sizes, **fields})
    tail = dense_tail * 2 * 4  # logits of the dense rows of two heads
    largest, total = {}, {}
    for tokens in (SHORT, LONG):
        q, k, v = make_qkv(tokens, heads=1)
        seen = allocations(
            lambda q=q, k=k, v=v: hip_attention(
                q, k, v, config=config, return_lse=True, return_mask=True
            )
        )
        largest[tokens], total[tokens] = seen.largest, seen.total
        assert seen.largest <= max(2 * BYTES_PER_TOKEN, tail) * tokens, (
            f"{seen.largest} bytes at once in {seen.op}"
        )
    assert largest[LONG] <= 2.1 * largest[SHORT]
    # every query block has temporaries of its own, whose size grows with the depth of the tree at
    # most
    assert total[LONG] <= 2.5 * total[SHORT]


@pytest.mark.parametrize(("family", "path"), [("llama", "sparse"), ("mistral", "dense")])
def test_a_models_forward_allocates_a_constant_per_token(
    family: str, path: str, small_buffers: None
) -> None:
    """Masks, rotations and projections included; left-padded, so that there is a mask. Mistral: a
    window below the budget."""
    model = make_model(family, budget=64, window=64, block_q=256, query_stride=64)
    largest = {}
    for tokens in (SHORT, LONG):
        mask = torch.ones(1, tokens, dtype=torch.long)
        mask[:, :5] = 0
        ids = torch.full((1, tokens), 7)
        with torch.inference_mode():
            seen = allocations(
                lambda ids=ids, mask=mask: model(ids, attention_mask=mask, logits_to_keep=1)
            )
        assert {row.path for row in hip_hf.explain(model)} == {path}
        # pages of the cache are added half as large as what is there; a token's hidden state is 256
        # bytes
        assert seen.largest <= 1024 * tokens, f"{seen.largest} bytes at once in {seen.op}"
        largest[tokens] = seen.largest
    assert largest[LONG] <= 2.1 * largest[SHORT]


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        (dict(decode_refresh=1), torch.float32),
        (dict(decode_refresh=1, rescore=4), torch.bfloat16),
        (dict(decode_refresh=8), torch.float32),
    ],
)
def test_a_decode_step_allocates_nothing_that_grows(fields: dict, dtype: torch.dtype) -> None:
    """Searches, appends to the pyramid and reuse included; but not the rare step at which a table
    of it doubles."""
    config = HiPConfig(
        **{
            **dict(block_k=4, budget=64, window=32, sink=16, beam=2, rescore=3, dense_below=0),
            **fields,
        }
    )
    largest, total = {}, {}
    for tokens in (SHORT, LONG):
        q, k, v = make_qkv(tokens + 50, 1, heads=1, dtype=dtype)
        state, seen = DecodeState(), []

        def step(
            at: int,
            q: torch.Tensor = q,
            k: torch.Tensor = k,
            v: torch.Tensor = v,
            state: DecodeState = state,
        ) -> None:
            hip_attention(
                q, k[:, :, :at], v[:, :, :at], config=config, state=state, return_lse=True
            )

        step(tokens)
        for at in range(tokens + 1, tokens + 51):
            tables = [table.shape for table in state.rows[0].pyramid.levels]
            spent = allocations(lambda at=at, step=step: step(at))
            if tables == [table.shape for table in state.rows[0].pyramid.levels]:
                seen.append(spent)
        assert len(seen) >= 45
        largest[tokens] = max(s.largest for s in seen)
        total[tokens] = max(s.total for s in seen)
    assert largest[LONG] == largest[SHORT] < 4 * SHORT
    assert total[LONG] <= 1.25 * total[SHORT]  # the search has one level more


def test_a_decode_step_makes_no_copy_of_a_cache_slot_by_slot() -> None:
    """A static cache, of which the keys seen so far are a slice."""
    q, k, v = make_qkv(LONG, 1, batch=2, heads=1)
    config, state = (
        HiPConfig(budget=64, window=32, sink=16, beam=2, rescore=1, dense_below=0),
        DecodeState(),
    )
    start = torch.tensor([0, 77])
    for at in range(SHORT, SHORT + 40):
        hip_attention(
            q, k, v, config=config, key_start=start, q_start=torch.tensor([at, at]), state=state
        )
    at = torch.tensor([SHORT + 40] * 2)
    seen = allocations(
        lambda: hip_attention(q, k, v, config=config, key_start=start, q_start=at, state=state)
    )
    assert seen.largest < SHORT


@pytest.mark.parametrize("given", [dict(), dict(softcap=2.0), dict(sliding_window=1000)])
def test_dense_attention_never_holds_a_square(given: dict) -> None:
    largest = {}
    for tokens in (2048, 4096):
        q, k, v = make_qkv(tokens, heads=1)
        problem = make_problem(q, k, v, **given)
        largest[tokens] = allocations(
            lambda problem=problem: attend(problem, HiPConfig(method="dense"), need_lse=True)
        ).largest
    assert largest[4096] <= 2.1 * largest[2048]
