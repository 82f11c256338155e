"""Decode steps under a kept selection: what they read lies side by side, and a step adds its own
key to it.

That every step reads what it must is in `test_state.py`; here: which steps take this way, how exact
it is, and that copies part.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from helpers import assert_near, eager, make_qkv, small, sparse
from transformers import PreTrainedModel
from twin import Twin

import hip_hf
from hip_hf import attention
from hip_hf.backends.torch.decode_buffer import DecodeBuffer, attend_next
from hip_hf.backends.torch.sparse import SparseAttention
from hip_hf.integration import decode_fast_path
from hip_hf.state import DecodeState

PROMPT, REFRESH = 200, 4


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who took the short way, in order."""
    seen: list[str] = []
    for module in (attention, decode_fast_path):

        def counted(*args: Any, name: str = module.__name__, **kwargs: Any) -> Any:
            seen.append(name.rpartition(".")[2])
            return attend_next(*args, **kwargs)

        monkeypatch.setattr(module, "attend_next", counted)
    return seen


def decode(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, first: int, last: int, **fields: Any
) -> torch.Tensor:
    """Logits of the tokens `first` to `last - 1`, one at a time."""
    with torch.no_grad():
        return torch.cat(
            [
                model(ids[:, i : i + 1], past_key_values=cache, **fields).logits
                for i in range(first, last)
            ],
            1,
        )


def filled(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(ids[:, :PROMPT], use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("fields", "call", "expected"),
    [
        (dict(decode_refresh=REFRESH), {}, [0, 1, 1, 1, 0, 1, 1, 1, 0]),
        (
            dict(decode_refresh=REFRESH),
            dict(softcap=2.0, sinks=torch.randn(4)),
            [0, 1, 1, 1, 0, 1, 1, 1, 0],
        ),
        (dict(decode_refresh=1), {}, [0] * 9),
        (
            dict(decode_refresh=REFRESH, group_shared=False),
            {},
            [0] * 9,
        ),  # heads of a group read keys of their own
        (
            dict(decode_refresh=REFRESH),
            dict(sliding_window=60),
            [0] * 9,
        ),  # what is read changes at each step
    ],
    ids=["kept", "softcap and sinks", "refreshed", "per head", "sliding"],
)
def test_steps_that_select_nothing_add_their_own_key_alone(
    fields: dict, call: dict, expected: list[int], steps: list[str], poison: None
) -> None:
    twin = Twin(small(**fields), [0, 5], call)
    twin.call(100)
    taken = []
    for _ in range(9):
        before = len(steps)
        twin.call(1)
        taken.append(len(steps) - before)
    assert taken == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 3])
def test_as_exact_as_plain_attention(
    groups: int, dtype: torch.dtype, steps: list[str], poison: None
) -> None:
    """Against float64 over the keys that the steps read, with odd head dims and padding; the worst
    of all steps, since a single row's plain error may be small by chance."""
    config, pads, tokens = small(decode_refresh=8), [0, 11], 140
    q, k, v = make_qkv(tokens, batch=2, groups=groups, dim=24, dv=40, dtype=dtype)
    state = DecodeState()
    misses, plain_misses = [], []
    for at in range(100, tokens):
        fields = dict(key_start=pads, state=state, need_mask=False)
        got = sparse(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], config, **fields)
        read = torch.zeros(2, q.shape[1], 1, at + 1, dtype=torch.bool)
        for b, pad in enumerate(pads):
            kept = state.rows[b].selection
            assert kept is not None
            assert kept.ids is not None
            place = torch.arange(at + 1) - pad
            for head in range(q.shape[1]):
                chosen = torch.isin(place // config.block_k, kept.ids[head // groups, 0, 0])
                read[b, head, 0] = (place >= 0) & (
                    (place < config.sink) | (place >= kept.window_start) | chosen
                )
        own = (q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], read)
        (want, _), (plain, _) = eager(*own), eager(*own, dtype=dtype)
        misses.append(float((got.out - want).abs().max()))
        plain_misses.append(float((plain - want).abs().max()))
    assert max(misses) <= 2 * max(plain_misses)
    assert len(steps) == 40 * 7 // 8


def test_copies_part(steps: list[str]) -> None:
    """Beams, repeated rows and copied states go on by themselves; one row keeps all, a copy gathers
    when it selects."""
    twin = Twin(small(decode_refresh=8), [0, 5])
    twin.call(100)
    twin.call(1)
    first = twin.state.rows[0].decode_buffer
    assert isinstance(first, DecodeBuffer)
    twin.reorder([1, 0])
    assert twin.state.rows[1].decode_buffer is first
    twin.repeat(2)
    lacking = [row.decode_buffer is None for row in twin.state.rows.values()]
    assert lacking == [False, True, False, True]
    assert twin.state.rows[2].decode_buffer is first
    for _ in range(6):
        twin.call(1)
    assert twin.state.rows[1].decode_buffer is None
    for _ in range(4):
        twin.call(1)
    assert len({id(row.decode_buffer) for row in twin.state.rows.values()} - {id(None)}) == 4
    other = copy.deepcopy(twin)
    for one in (twin, other):
        del steps[:]
        for _ in range(3):
            one.call(1)
        assert len(steps) == 3


def test_what_was_gathered_for_other_calls_is_not_read(steps: list[str]) -> None:
    """Another sliding window, dtype or number of heads on the same state."""
    config = small(decode_refresh=64)
    q, k, v = make_qkv(140)
    other = make_qkv(140, heads=1)

    def step(state: DecodeState, at: int, tensors: Any = (q, k, v), **fields: Any) -> torch.Tensor:
        q, k, v = tensors
        call = (q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1])
        return sparse(*call, config, state=state, need_mask=False, **fields).out

    def begun() -> DecodeState:
        state = DecodeState()
        for at in (100, 101, 102):
            step(state, at)
        return state

    assert len(steps) == 0
    state = begun()
    assert len(steps) == 2
    far = [x.clone() for x in (q, k, v)]
    far[2][:, :, :20] += 1000
    near = step(copy.deepcopy(state), 103, sliding_window=80)
    assert_near(step(state, 103, far, sliding_window=80), near, 1e-6)
    state, doubles = begun(), tuple(x.double() for x in (q, k, v))
    got = step(state, 103, doubles)
    assert state.rows[0].decode_buffer.k.dtype == torch.float64
    assert_near(got, step(DecodeState(), 103, doubles), 1e-12)
    assert_near(step(begun(), 103, other), step(DecodeState(), 103, other), 1e-6)
    assert len(steps) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_no_longer_read_leave_nothing_behind(
    dtype: torch.dtype, steps: list[str]
) -> None:
    """Rows of the buffers that are not in use are multiplied, too: a value that was infinite or NaN
    there must be gone."""
    config = small(decode_refresh=64)
    q, k, v = make_qkv(140, dtype=dtype)
    spoilt = v.clone()
    spoilt[:, :, 103:] = (
        torch.tensor([torch.nan, torch.inf]).repeat(v.shape[-1])[: v.shape[-1]].to(dtype)
    )

    def step(state: DecodeState, at: int, values: torch.Tensor) -> torch.Tensor:
        call = (q[:, :, at : at + 1], k[:, :, : at + 1], values[:, :, : at + 1])
        return sparse(*call, config, state=state, need_mask=False).out

    state = DecodeState()
    for at in range(100, 130):
        step(state, at, spoilt)
    room = state.rows[0].decode_buffer.k.shape[1]
    state.crop(100)
    for at in (100, 101, 102, 103):
        got = step(state, at, v)
    assert state.rows[0].decode_buffer.count < state.rows[0].decode_buffer.k.shape[1] == room
    fresh = DecodeState()
    for at in (100, 101, 102, 103):
        want = step(fresh, at, v)
    assert got.isfinite().all()
    assert_near(got, want, 1e-6 if dtype == torch.float32 else 1e-2)
    assert len(steps) == 29 + 3 + 3


def test_memory_does_not_grow_with_the_context_nor_from_one_selection_to_the_next() -> None:
    config = small(decode_refresh=REFRESH)
    twin = Twin(config, [0])
    twin.call(60)
    twin.call(1)
    buffers = twin.state.rows[0].decode_buffer.k
    reach = config.sink + config.budget + config.window
    assert buffers.shape[1] <= reach + config.block_k + REFRESH
    for _ in range(40):
        twin.call(1)
    assert twin.state.rows[0].decode_buffer.k is buffers


def test_an_offloaded_cache_reads_its_device_pools(steps: list[str]) -> None:
    """Which hold what is read side by side already, and are counted."""
    model, ids = make_model("llama", decode_refresh=REFRESH), make_batch([PROMPT + 9])["input_ids"]
    resident, offloaded = (
        filled(model, ids),
        hip_hf.HiPCache(model.config, offload="cpu", device_pages=8),
    )
    want = decode(model, ids, resident, PROMPT, PROMPT + 9)
    assert len(steps) == 2 * 6  # two layers
    del steps[:]
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=offloaded)
    torch.testing.assert_close(
        decode(model, ids, offloaded, PROMPT, PROMPT + 9), want, rtol=1e-4, atol=1e-5
    )
    assert not steps


def test_stages_with_intervals_of_their_own(
    steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gathered serves until the next stage selects."""
    config = small(
        method="staged", options={"stages": [[8, 64, 2], [4, 16, 2]]}, decode_refresh=[8, REFRESH]
    )
    q, k, v = make_qkv(140, dtype=torch.float64)
    outs = []
    for gathers in (True, False):
        if not gathers:
            monkeypatch.setattr(SparseAttention, "_uses_decode_buffer", lambda *args: False)
        state = DecodeState()
        calls = ((q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(100, 140))
        outs.append(
            torch.cat(
                [sparse(*call, config, state=state, need_mask=False).out for call in calls], dim=2
            )
        )
        assert len(steps) == 30
    assert_near(*outs, 1e-12)


# Patched layers take the same way without the interface.


@pytest.mark.parametrize("extend", [None, "streaming"])
@pytest.mark.parametrize("lengths", [[209], [209, 150]], ids=["one", "padded"])
def test_patched_layers_take_it_directly(
    extend: str | None, lengths: list[int], steps: list[str]
) -> None:
    """Once a layer has answered by the interface which rows there are; to the bit what the
    interface gives."""
    model, batch = make_model("llama", decode_refresh=REFRESH), make_batch(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    results = []
    for patched in (False, True):
        if patched:
            hip_hf.patch(model)
        if extend:  # which only patched layers of this model can do
            hip_hf.configure(model, extend=extend)
        with torch.no_grad():
            cache = model(
                ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], use_cache=True
            ).past_key_values
        outs = []
        for at in range(PROMPT, PROMPT + 9):
            outs.append(decode(model, ids, cache, at, at + 1, attention_mask=mask[:, : at + 1]))
        results.append(torch.cat(outs, 1))
        assert paths(model) == ["sparse", "sparse"]
        assert {row.cache for row in hip_hf.explain(model)} == {"pages"}
    assert torch.equal(*results)
    ways = ["decode_fast_path" if extend else "attention", "decode_fast_path"]
    assert steps == [way for way in ways for _ in range(2 * 6)]


def test_patched_layers_leave_it_when_the_settings_change(steps: list[str]) -> None:
    model, ids = make_model("llama", decode_refresh=REFRESH), make_batch([PROMPT + 9])["input_ids"]
    hip_hf.patch(model)
    cache = filled(model, ids)
    decode(model, ids, cache, PROMPT, PROMPT + 2)
    assert steps == ["decode_fast_path"] * 2
    hip_hf.configure(model, dense_layers=2)
    decode(model, ids, cache, PROMPT + 2, PROMPT + 3)
    assert steps == ["decode_fast_path"] * 2
    assert paths(model) == ["dense", "dense"]


def test_patched_layers_refuse_what_the_interface_refuses(steps: list[str]) -> None:
    """Tokens of another dtype than the cache's, or attention weights, asked for at a step that
    selects nothing."""
    model, ids = make_model("llama", decode_refresh=REFRESH), make_batch([PROMPT + 9])["input_ids"]
    hip_hf.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(model, ids)
        decode(model, ids, cache, PROMPT, PROMPT + 2)
    assert len(steps) == 2
    with pytest.raises(ValueError, match="value_states: got"):
        decode(model, ids, cache, PROMPT + 2, PROMPT + 3)
    with (
        pytest.raises(ValueError, match="output_attentions: got True"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        decode(model, ids, cache, PROMPT + 2, PROMPT + 3, output_attentions=True)
    assert cache.get_seq_length() == PROMPT + 2
    assert len(steps) == 2


@pytest.mark.parametrize("where", ["page", "attention"])
def test_a_patched_step_that_fails_is_said_at_the_next_use(
    where: str, monkeypatch: pytest.MonkeyPatch, steps: list[str]
) -> None:
    model, ids = make_model("llama", decode_refresh=REFRESH), make_batch([PROMPT + 9])["input_ids"]
    hip_hf.patch(model)
    cache = filled(model, ids)
    decode(model, ids, cache, PROMPT, PROMPT + 2)
    layer = cache.layers[1]

    def fails(*args: Any) -> Any:
        raise MemoryError("no memory")

    if where == "page":
        monkeypatch.setattr(layer.pool, "append", fails)
    else:
        monkeypatch.setattr(layer.hip_state.rows[0].decode_buffer, "attend", fails)
    with pytest.raises(MemoryError, match="no memory"):
        decode(model, ids, cache, PROMPT + 2, PROMPT + 3)
    monkeypatch.undo()
    assert [one.get_seq_length() for one in cache.layers] == [
        PROMPT + 3,
        PROMPT + 2 + (where == "attention"),
    ]
    with pytest.raises(
        ValueError, match=r"a part of a call which failed \(MemoryError\), allowed: `reset\(\)`"
    ):
        decode(model, ids, cache, PROMPT + 3, PROMPT + 4)
