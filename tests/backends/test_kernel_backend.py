"""The kernels behind `hip_attention` against the torch backend: same blocks, same output, same life
of a decode state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_backends import NEAR, both, call, same
from helpers import assert_near, make_problem, make_qkv, small
from interpreter import DEVICE

import hip_hf
from hip_hf.attention import attend
from hip_hf.backends.triton.selection.search import SelectionBuffers
from hip_hf.state import DecodeState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(dense_tail=21),
        dict(method="streaming", dense_tail=5),
        dict(group_shared=False, score="max", rescore=2),
        dict(representative="middle", query_stride=5),
    ],
)
def test_prompt(config: dict[str, Any]) -> None:
    both(*make_qkv(141, 50), config)


@pytest.mark.fast
def test_prompt_with_padding_on_either_side() -> None:
    both(
        *make_qkv(130, 40, batch=3),
        dict(dense_tail=7),
        key_start=[0, 33, 110],
        q_start=[70, 90, 90],
    )


def test_prompt_with_softcap_sinks_and_sliding_window() -> None:
    both(
        *make_qkv(163, 30),
        dict(dense_tail=4),
        softcap=3.0,
        sliding_window=120,
        sinks=torch.randn(4),
    )


@pytest.mark.parametrize("config", [dict(), dict(method="streaming"), dict(group_shared=False)])
def test_decode_with_a_state(config: dict[str, Any]) -> None:
    """A prompt, steps across refreshes and key blocks, a crop, a step of several rows, a reordered
    batch."""
    q, k, v = make_qkv(160, batch=2, heads=1)
    states = {"triton": DecodeState(), "torch": DecodeState()}

    def step(first: int, end: int, kept: bool = True) -> None:
        results = []
        for backend, state in states.items():
            settings = small(backend=backend, decode_refresh=3, **config)
            results.append(
                call(
                    q[:, :, first:end],
                    k[:, :, :end],
                    v[:, :, :end],
                    settings,
                    state,
                    key_start=[0, 21],
                )
            )
        if kept:
            same(*results)
        else:
            assert_near(results[0].out.cpu(), results[1].out, NEAR)

    step(0, 150)
    for position in range(150, 156):
        step(position, position + 1)
    for state in states.values():
        state.crop(120)
    step(120, 121)
    step(121, 122)
    step(122, 126)
    for state in states.values():
        state.reset()
    step(0, 100)
    step(100, 101)
    for state in states.values():
        state.reorder([1, 1])
    q, k, v = (x[[1, 1]] for x in (q, k, v))
    got = []
    for backend, state in states.items():
        settings = small(backend=backend, decode_refresh=3, **config)
        got.append(
            call(
                q[:, :, 101:102], k[:, :, :102], v[:, :, :102], settings, state, key_start=[21, 21]
            )
        )
    same(*got)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_state_reordered_under_inference_mode_lives_on_outside(backend: str) -> None:
    q, k, v = make_qkv(60, batch=2, heads=1)
    config, state = small(backend=backend), DecodeState()

    def step(first: int, end: int) -> None:
        call(q[:, :, first:end], k[:, :, :end], v[:, :, :end], config, state)

    with torch.inference_mode():
        step(0, 50)
        step(50, 51)
        state.reorder([1, 1])
    with torch.no_grad():
        step(51, 52)
        state.crop(40)
        step(40, 41)


def test_a_state_grows_beyond_its_first_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from hip_hf.backends.triton import sparse

    monkeypatch.setattr(sparse, "ROOM", 0.0)
    monkeypatch.setattr(sparse, "LEAST_ROOM", 1)
    q, k, v = make_qkv(150)
    states = {"triton": DecodeState(), "torch": DecodeState()}
    capacities = set()
    for first, end in ((0, 60), (60, 100), (100, 101), (101, 102), (102, 150)):
        results = []
        for name, state in states.items():
            results.append(
                call(q[:, :, first:end], k[:, :, :end], v[:, :, :end], small(backend=name), state)
            )
        same(*results)
        capacities.add(states["triton"].device.capacity)
    assert len(capacities) > 1


@pytest.mark.fast
def test_decode_without_a_state() -> None:
    both(*make_qkv(170, 3), dict())


@pytest.mark.fast
def test_gradients() -> None:
    q, k, v = make_qkv(120, 50)
    grads = []
    for backend in ("triton", "torch"):
        device = DEVICE if backend == "triton" else "cpu"
        leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
        out, lse = hip_hf.hip_attention(
            *leaves, config=small(backend=backend, dense_tail=9), return_lse=True
        )
        torch.manual_seed(3)
        weight = torch.randn(out.shape).to(device)
        ((out * weight).sum() + lse.sum()).backward()
        grads.append([x.grad.cpu() for x in leaves])
    for name, got, want in zip("qkv", *grads, strict=True):
        assert_near(got, want, 10 * NEAR, f"gradient of {name}")


@pytest.mark.parametrize(
    ("config", "dtype", "why"),
    [
        (dict(), torch.float64, "float64"),
        (dict(method="oracle"), torch.float32, "oracle"),
        (dict(budget=16384, beam=8), torch.float32, "beam"),
        (dict(method="streaming", options=dict(recent=True)), torch.float32, "recent"),
    ],
)
def test_asked_for_by_name_it_serves_or_says_why_not(
    config: dict[str, Any], dtype: torch.dtype, why: str
) -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(100, 20, dtype=dtype))
    with pytest.raises(
        ValueError, match=rf"HiPConfig.backend: got 'triton', allowed here: auto \| torch \(.*{why}"
    ):
        hip_hf.hip_attention(q, k, v, config=small(backend="triton", **config))


@pytest.mark.skipif(DEVICE != "cuda", reason="`auto` takes the kernels on a GPU only")
def test_auto_takes_the_kernels_on_a_gpu_and_says_when_it_cannot() -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(100, 20, dtype=torch.float64))
    result = attend(make_problem(q, k, v), small())
    assert (result.path, result.reason) == ("dense", "no kernels: float64 has no kernels")
    result = attend(make_problem(q.float(), k.float(), v.float()), small())
    assert result.reason == ""


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_serves_a_growing_sequence() -> None:
    """One graph, replayed while only numbers on the device change, gives what step after step
    gives."""
    from hip_hf.backends.triton.common.arguments import Logits, Operands
    from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
    from hip_hf.backends.triton.sparse import DeviceState, decode_step
    from hip_hf.geometry import Span

    config = small(decode_refresh=3, backend="triton")
    q, k, v = (x.to(DEVICE) for x in make_qkv(200))
    problem = make_problem(q[:, :, :1], k, v)
    row, out = q[:, :, 100:101].clone(), torch.empty_like(q[:, :, :1])
    x = Operands(row, KeyValues(k, v), Logits(problem.scale), out)
    sequences = Sequences.of([Span(0, 0, 200, 0, 1, 100)], torch.device(DEVICE))

    def fresh() -> DeviceState:
        return DeviceState.make(config, problem, 200)

    state = fresh()
    decode_step(x, sequences, config, state)  # compiles
    kept, graph = fresh(), torch.cuda.CUDAGraph()
    decode_step(x, sequences, config, kept)
    with torch.cuda.graph(graph):
        decode_step(x, sequences, config, kept)
    state = fresh()
    decode_step(x, sequences, config, state)
    for position in range(101, 140):
        sequences.table[4] = position
        row.copy_(q[:, :, position : position + 1])
        graph.replay()
        replayed = out.clone()
        decode_step(x, sequences, config, state)
        assert torch.equal(out, replayed), position


def test_the_host_knows_how_old_selections_are_as_the_device_does() -> None:
    """Steps launch nothing for selections that still serve, so the two must not differ, whatever
    happens in between."""
    config = small(backend="triton", decode_refresh=3)
    q, k, v = (x.to(DEVICE) for x in make_qkv(110, batch=2))
    state, key_start = DecodeState(), torch.tensor([0, 13])
    calls, at = [], 0
    for rows in (80, 1, 1, 1, 1, 3, 1, 1, -5, 1, 1, 1):
        at += rows
        if rows < 0:
            state.crop(at)
        else:
            now = q[:, :, at - rows : at], k[:, :, :at], v[:, :, :at]
            got = hip_hf.hip_attention(*now, config=config, key_start=key_start, state=state)
            assert got.isfinite().all()
        made = [int(row[0, 0]) for row in state.device.selection.made]
        for batch, row in state.rows.items():
            assert row.on_device
            assert made[batch] == (
                SelectionBuffers.NEVER if row.selection is None else row.selection.position
            )
        calls.append(made[0])
    assert calls == [
        SelectionBuffers.NEVER,
        80,
        80,
        80,
        83,
        SelectionBuffers.NEVER,
        87,
        87,
        SelectionBuffers.NEVER,
        84,
        84,
        84,
    ]
