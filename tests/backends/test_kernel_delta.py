"""Delta correction on the kernels: what the torch backend gives, its anchors in one launch, and
nothing of it elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, causal, eager, make_qkv, small
from interpreter import DEVICE
from kernel_cases import assert_half_precision, assert_same, call

import hip_hf
from hip_hf.backends.torch.delta import spread
from hip_hf.backends.triton import delta
from hip_hf.backends.triton.common.arguments import Operands, Part
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.geometry import Span
from hip_hf.state import DecodeState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

# In fp32 both backends read the same blocks; what is left is the order of sums, three times:
# sparse, dense, and their difference.
NEAR = 5e-5


@pytest.fixture
def strides(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(stride, sequences) of every launch of dense rows at a stride."""
    launched = []

    def noted(x: Operands, part: Part, stride: int) -> None:
        launched.append((stride, part.sequences.count))
        launch(x, part, stride)

    launch = delta.prefill
    monkeypatch.setattr(delta, "prefill", noted)
    return launched


def both(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: dict[str, Any], **fields: Any
) -> None:
    assert_same(
        *(
            call(q, k, v, small(backend=backend, **config), **fields)
            for backend in ("triton", "torch")
        ),
        NEAR,
    )


HYPER = dict(method="hyper", options=dict(min_seq_len=32, block_size=8, sample_size=8))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("gamma", "config"),
    [
        (16, dict()),
        (7, dict(dense_tail=20, group_shared=False)),
        (9, dict(method="streaming")),
        (16, HYPER),
    ],
)
def test_a_prompt_is_corrected_in_one_launch(
    gamma: int, config: dict[str, Any], strides: list[Any]
) -> None:
    both(*make_qkv(109), dict(delta=gamma, **config))
    assert strides == [(gamma, 1)]


@pytest.mark.usefixtures("poison")
def test_rows_that_start_anywhere(strides: list[Any]) -> None:
    """Padding on either side, a cache that the queries continue at any position, a row shorter than
    the dense tail."""
    q, k, v = make_qkv(130, 60, batch=3)
    both(q, k, v, dict(delta=11), key_start=[0, 33, 112], q_start=[50, 60, 70])
    assert strides == [(11, 3)]


def test_softcap_sinks_and_sliding_window() -> None:
    both(
        *make_qkv(123, 50),
        dict(delta=8),
        softcap=3.0,
        sliding_window=90,
        sinks=torch.randn(4),
    )


def test_chunks_and_decode_go_on_with_what_was_kept() -> None:
    """Chunks that end between anchors; steps across anchors and refreshes; a crop; steps of several
    rows; a reordered batch."""
    q, k, v = make_qkv(150, batch=2, heads=1)
    states = {"triton": DecodeState(), "torch": DecodeState()}
    fields = dict(delta=8, decode_refresh=3)

    def step(first: int, end: int, start: int = 21) -> None:
        tensors = (q[:, :, first:end], k[:, :, :end], v[:, :, :end])
        padding = [0, 21] if start == 21 else [start, start]
        results = (
            call(*tensors, small(backend=name, **fields), state, key_start=padding)
            for name, state in states.items()
        )
        assert_same(*results, NEAR)

    for first, end in ((0, 60), (60, 101), (101, 130), *((at, at + 1) for at in range(130, 140))):
        step(first, end)
    for length, steps in ((133, ((133, 134), (134, 143))), (140, ((140, 141),))):
        for state in states.values():
            state.crop(length)
        for first, end in steps:
            step(first, end)
    for state in states.values():
        state.reorder([0, 0])
    q, k, v = (x[[0, 0]] for x in (q, k, v))
    step(141, 142, start=0)
    kept = states["triton"].rows[1].correction
    assert kept is not None
    assert kept.position == states["torch"].rows[1].correction.position  # type: ignore[union-attr]
    assert kept.out.untyped_storage().nbytes() == kept.out.nbytes, (
        "a view keeps a prompt's differences alive"
    )


def test_a_step_at_an_anchor_is_dense() -> None:
    q, k, v = make_qkv(90)
    config, state = small(backend="triton", delta=8), DecodeState()
    call(q[:, :, :88], k[:, :, :88], v[:, :, :88], config, state)
    got = call(q[:, :, 88:89], k[:, :, :89], v[:, :, :89], config, state)
    assert got.density == 1
    assert_near(
        got.out.cpu(), eager(q[:, :, 88:89], k[:, :, :89], v[:, :, :89], causal(1, 1, 89))[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_differences_are_spread_over_rows(dtype: torch.dtype) -> None:
    """The kernel alone: rows of two sequences of different length and position, others untouched,
    error against float64 at most twice that of the same sum in `dtype`."""
    gamma, dv, heads = 7, 24, 3
    spans = [
        Span(0, 0, 90, 2, 55, 37),
        Span(1, 5, 70, 9, 60, 14),
    ]  # position 14 has an anchor of its own
    leads = [33, 14]
    out, lse = torch.randn(2, heads, 61, dv).to(dtype), torch.randn(2, heads, 61)
    change, change_lse = torch.randn(2, heads, 10, dv), torch.randn(2, heads, 10)
    got, got_lse = out.clone().to(DEVICE), lse.clone().to(DEVICE)
    sequences = Sequences.of(spans, torch.device(DEVICE))
    on = [x.to(DEVICE) for x in (change, change_lse)]
    grid, arguments = delta.spread_arguments(got, got_lse, *on, sequences, gamma)
    delta.spread_kernel[grid](**arguments)
    for s, span in enumerate(spans):
        positions = torch.arange(span.position, span.end)
        at = [leads[s], *range(-(-span.position // gamma) * gamma, span.end, gamma)]
        first = int(span.position % gamma == 0)  # nothing uses the lead then
        rows = slice(span.row_start, span.row_end)
        for x, y, by in ((got, out, change), (got_lse, lse, change_lse)):
            more = spread(
                by[s, None, :, first : len(at)].double(), torch.tensor(at[first:]), positions
            )[0]
            exact = y[span.batch, :, rows].double() + more
            plain = (y[span.batch, :, rows] + more.to(y.dtype)).double()
            least = torch.finfo(y.dtype).eps * float(exact.abs().max())
            assert_near(
                x[span.batch, :, rows].cpu(),
                exact,
                2 * max(least, float((plain - exact).abs().max())),
            )
        outside = [row for row in range(61) if not span.row_start <= row < span.row_end]
        assert torch.equal(got[span.batch, :, outside].cpu(), out[span.batch, :, outside])
        assert torch.equal(got_lse[span.batch, :, outside].cpu(), lse[span.batch, :, outside])


def test_half_precision_is_as_exact_as_the_torch_backend() -> None:
    """Streaming reads the same keys whatever the dtype; the rest is rounding."""
    configs = (
        small(backend=backend, method="streaming", delta=16) for backend in ("triton", "torch")
    )
    assert_half_precision(*configs)


def test_a_compiled_graph_gives_what_eager_gives() -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(100, 60, batch=2))
    start, at = torch.tensor([0, 31], device=DEVICE), torch.tensor([40, 40], device=DEVICE)
    fields = dict(
        config=small(backend="triton", delta=8), key_start=start, q_start=at, return_lse=True
    )
    graph = torch.compile(
        lambda *x: hip_hf.hip_attention(*x, **fields), fullgraph=True, backend="aot_eager"
    )
    for got, want in zip(graph(q, k, v), hip_hf.hip_attention(q, k, v, **fields), strict=True):
        assert torch.equal(got, want)


def test_gamma_1_says_that_it_is_dense() -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(60))
    with pytest.raises(ValueError, match="every row is dense"):
        hip_hf.hip_attention(q, k, v, config=small(backend="triton", delta=1))
