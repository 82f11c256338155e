"""Dense rows by the kernels: where PyTorch's attention cannot serve, split over their keys, on the
device of the tensors."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import kernel_cases
import pytest
import torch
from both_backends import NEAR, both, call
from helpers import assert_near, make_problem, make_qkv, small
from interpreter import DEVICE
from paging import token_major

from hip_hf.attention import Result, attend
from hip_hf.backends.torch import dense as reference
from hip_hf.backends.triton import dense
from hip_hf.backends.triton.attention import decode, prefill
from hip_hf.backends.triton.common.tuning import TILES
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.state import DecodeState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who computed: `kernels`, `sdpa`, or `tiles` for the torch backend's loop."""
    found: list[str] = []

    def note(module: Any, name: str, who: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: found.append(who) or original(*args))

    note(dense, "attend_densely", "kernels")
    note(reference, "sdpa", "sdpa")
    note(reference, "attend_range", "tiles")
    return found


def densely(name: str, tensors: Any, fields: dict[str, Any], need_lse: bool) -> Result:
    tensors = [
        x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in tensors
    ]  # pages are there
    return attend(
        make_problem(*tensors, **fields), HiPConfig(method="dense", backend=name), need_lse=need_lse
    )


@pytest.mark.parametrize(
    ("rows", "fields", "need_lse", "who"),
    [
        (90, dict(), False, "sdpa"),
        (1, dict(), False, "sdpa"),
        (90, dict(), True, "kernels"),
        (90, dict(softcap=3.0), False, "kernels"),
        (90, dict(sinks=torch.linspace(-1, 1, 4)), False, "kernels"),
        (90, dict(sliding_window=40), False, "kernels"),
        (33, dict(key_start=[0, 21]), False, "kernels"),  # a chunk of a prompt
        (1, dict(softcap=3.0, key_start=[0, 21]), False, "kernels"),
    ],
)
def test_who_serves_dense_attention(
    rows: int, fields: dict[str, Any], need_lse: bool, who: str, served: list[str], poison: None
) -> None:
    tensors = make_qkv(90, rows, batch=2)
    fields = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in fields.items()
    }
    got = densely("triton", tensors, fields, need_lse)
    assert set(served) == {who}
    want = densely("torch", tensors, fields, True)
    assert_near(got.out.cpu(), want.out.cpu(), NEAR)
    if need_lse:
        assert got.lse is not None
        assert want.lse is not None
        assert_near(got.lse.cpu(), want.lse.cpu(), NEAR, "lse")


def test_pages_that_lie_apart_are_read_by_the_kernels(served: list[str]) -> None:
    q, k, v = make_qkv(90, 1, batch=2)
    got = densely("triton", (q, *token_major(k, v, 20)), dict(key_start=[0, 21]), False)
    assert set(served) == {"kernels"}
    assert_near(
        got.out.cpu(), densely("torch", (q, k, v), dict(key_start=[0, 21]), False).out.cpu(), NEAR
    )


def test_gradients_of_a_dense_call(served: list[str]) -> None:
    found = []
    for name in ("triton", "torch"):
        torch.manual_seed(1)
        tensors = [x.to(DEVICE).requires_grad_() for x in make_qkv(70, 40)]
        result = densely(name, tensors, dict(softcap=3.0), False)
        found.append(torch.autograd.grad(result.out.square().sum(), tensors))
        assert set(served) == {"kernels" if name == "triton" else "tiles"}
        served.clear()
    for got, want in zip(*found, strict=True):
        assert_near(got.cpu(), want.cpu(), NEAR)


def test_a_tail_occupies_the_device() -> None:
    """64 rows of 8 key heads are some 16 programs, and an H200 has 132 processors."""
    q = torch.empty(1, 32, 8192, 128, dtype=torch.bfloat16, device=DEVICE)
    rows = TILES["prefill"]["sm90"][128][0] // 4
    programs = 8 * -(-64 // rows)
    splits = decode.splits_for(q, 8, 1, 1 << 17, 64, 64)
    assert (
        132 < programs * splits <= 264
    )  # enough for all, and not two waves of which the last is short
    assert decode.splits_for(q, 8, 64, 1 << 17, 64, 64) == 1, (
        "many sequences occupy it by themselves"
    )
    assert decode.splits_for(q, 8, 1, 1 << 17, 8192, 64) == 1, "as many rows do"


@pytest.mark.parametrize("ends", [(100, 100), (30, 100), (18, 100)])
def test_scratch_is_for_the_tails_alone(
    ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    """Also where the rows of a batch's sequences end apart, or are fewer than a tail."""
    made, original = [], decode.DecodeScratch.make
    monkeypatch.setattr(dense, "splits_for", lambda *_: 4)
    monkeypatch.setattr(
        decode.DecodeScratch, "make", lambda *args: made.append(original(*args)) or made[-1]
    )
    spans = tuple(Span(b, 0, 50 + end, 0, end, 50) for b, end in enumerate(ends))
    found = []
    for name in ("triton", "torch"):
        torch.manual_seed(1)
        device = DEVICE if name == "triton" else "cpu"
        problem = make_problem(*(x.to(device) for x in make_qkv(150, 100, batch=2)))
        found.append(
            attend(replace(problem, spans=spans), small(backend=name, dense_tail=20), need_lse=True)
        )
    kernel_cases.assert_same(*found, NEAR)
    assert {scratch.out.shape[3] for scratch in made} == {20}
    assert len(made) == len({max(0, end - 20) for end in ends})


@pytest.mark.parametrize(("rows", "kept"), [(1, False), (4, False), (4, True), (16, True)])
def test_a_few_rows_split_their_keys(
    rows: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits, original = [], decode.decode
    monkeypatch.setattr(
        decode, "decode", lambda *args: splits.append(args[2].out.shape[0]) or original(*args)
    )
    tensors = make_qkv(150, rows)
    results = [
        call(*tensors, small(backend=name), DecodeState() if kept else None)
        for name in ("triton", "torch")
    ]
    assert_near(results[0].out.cpu(), results[1].out.cpu(), NEAR)
    assert len(splits) == 1
    assert splits[0] > 1


def test_sinks_at_any_stride() -> None:
    every = torch.randn(8)
    both(*make_qkv(90, 40), {}, sinks=every[::2])


def test_kernels_run_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which is another where a model is spread over
    several."""
    current: list[Any] = []
    outside: list[str] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Any:
        current.append(x.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in (
        (prefill, "attend_kernel"),
        (decode, "attend_kernel"),
        (decode, "combine_kernel"),
    ):
        kernel = getattr(module, name)

        class Watched:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                outside.extend([name] * (not current))
                launches.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Watched())
    launches: list[str] = []
    for fields in (dict(dense_tail=4), dict(method="dense")):
        for rows in (1, 40):
            attend(
                make_problem(*(x.to(DEVICE) for x in make_qkv(90, rows)), softcap=3.0),
                small(backend="triton", **fields),
            )
    assert {"attend_kernel", "combine_kernel"} == set(launches)
    assert outside == []
