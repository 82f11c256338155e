"""Which way a call goes and why, what the dense ways compute, gradients, and the share of keys that
is said to be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    assert_as_exact_as,
    assert_near,
    causal,
    eager,
    make_problem,
    make_qkv,
    read_mask,
    small,
    sparse,
)

from hip_hf import DecodeState, HiPConfig, hip_attention
from hip_hf.attention import DENSE_BELOW, Result, attend
from hip_hf.geometry import keys_seen
from hip_hf.workers import compute_dtype

pytestmark = pytest.mark.fast


def call(
    tokens: int,
    rows: int | None = None,
    layer: int | None = None,
    given: dict | None = None,
    **fields: Any,
) -> Result:
    q, k, v = make_qkv(tokens, rows)
    return attend(make_problem(q, k, v, **(given or {})), small(**fields), layer)


# Why a call is dense.


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(tokens=50, method="dense"), "method is dense"),
        (dict(tokens=50, layer=2, dense_layers=3), "dense layer"),
        (dict(tokens=50, layer=5, dense_layers=[1, 5]), "dense layer"),
        (dict(tokens=50, layer=7, layers={7: {"method": "dense"}}), "method is dense"),
        (dict(tokens=50, layer=7, layers={7: {"dense_layers": [7]}}), "dense layer"),
        (dict(tokens=90, dense_below=91), "context of 90 is below dense_below=91"),
        (dict(tokens=90, rows=1, dense_below=91), "context of 90 is below dense_below=91"),
        (dict(tokens=36, dense_below=1), "the budget covers the context of 36"),
        (
            dict(tokens=100, given=dict(sliding_window=36)),
            "sliding window of 36 is within the sparse set",
        ),
        (
            dict(tokens=100, rows=1, given=dict(sliding_window=40)),
            "decode within a sliding window of 40",
        ),
    ],
)
def test_reasons_to_be_dense(arguments: dict, reason: str) -> None:
    result = call(**arguments)
    assert (result.path, result.reason, result.density, result.unsupported) == (
        "dense",
        reason,
        1.0,
        False,
    )
    assert result.mask is None


@pytest.mark.parametrize(
    "arguments",
    [
        dict(tokens=50),
        dict(tokens=20, rows=1),
        dict(tokens=50, layer=3, dense_layers=3),
        dict(tokens=50, layer=2, dense_layers=[1, 3]),
        dict(tokens=50, layer=None, dense_layers=100),
        dict(tokens=50, layer=7, method="dense", layers={7: {"method": "streaming"}}),
        dict(tokens=50, layer=0, layers={0: {"dense_layers": 0}}),
        dict(tokens=91, dense_below=91),
        dict(tokens=37, dense_below=1),
        dict(tokens=10, dense_below=0),
        dict(tokens=100, given=dict(sliding_window=37)),
    ],
)
def test_reasons_to_be_sparse(arguments: dict) -> None:
    result = call(**arguments)
    assert (result.path, result.reason, result.unsupported) == ("sparse", "", False)


@pytest.mark.parametrize(
    ("rows", "refresh", "which"),
    [(17, 8, 0), (1, 8, 1), (1, 1, 2), (16, 1, 2), (2, 8, 3), (16, 8, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_contexts_are_dense_by_default(
    rows: int, refresh: int, which: int, dtype: torch.dtype
) -> None:
    fields = dict(budget=64, window=64, dense_below=None, decode_refresh=refresh)
    limit = DENSE_BELOW[compute_dtype(torch.empty(0, dtype=dtype))][which]

    def at(tokens: int) -> Result:
        q, k, v = make_qkv(tokens, rows, dtype=dtype)
        return attend(make_problem(q, k, v), small(**fields), state=DecodeState())

    assert at(limit - 1).reason == f"context of {limit - 1} is below dense_below={limit}"
    assert at(limit).path == "sparse"


@pytest.mark.parametrize("rows", [1, 16])
def test_decode_that_would_summarise_all_keys_anew_is_dense(rows: int) -> None:
    """Unless its settings say from where on it is to be sparse, or its method keeps no
    summaries."""
    fields = dict(budget=64, window=64)
    q, k, v = make_qkv(max(DENSE_BELOW[torch.float32]) + 100, rows)

    def call(state: DecodeState | None = None, **fields: Any) -> Result:
        return attend(make_problem(q, k, v), small(**fields), state=state)

    for method in ("hip", "quest"):
        result = call(method=method, **fields, dense_below=None)
        assert (result.path, result.unsupported) == ("dense", False)
        assert result.reason == (
            "decode without kept state: to summarise all keys anew takes longer than to read them"
        )
        assert_near(result.out, eager(q, k, v, causal(1, rows, k.shape[2]))[0])
    assert call(method="streaming", **fields, dense_below=None).path == "sparse"
    assert call(DecodeState(), **fields, dense_below=None).path == "sparse"
    assert call(**fields, dense_below=100).path == "sparse"


def test_the_longest_row_of_a_batch_decides() -> None:
    q, k, v = make_qkv(100, batch=2)
    assert attend(make_problem(q, k, v, [0, 90]), small(dense_below=100)).path == "sparse"
    assert attend(make_problem(q, k, v, [1, 90]), small(dense_below=100)).path == "dense"
    assert attend(make_problem(q, k, v, [100, 100]), small()).reason == "no row has a key"


def test_a_state_lets_decode_within_a_sliding_window_be_sparse() -> None:
    q, k, v = make_qkv(100, 1)
    assert (
        attend(make_problem(q, k, v, sliding_window=40), small(), state=DecodeState()).path
        == "sparse"
    )


# What the dense ways compute.

FEATURES: list[dict[str, Any]] = [
    dict(),
    dict(softcap=2.0),
    dict(sliding_window=9),
    dict(sliding_window=1000),
    dict(sinks=torch.linspace(-2, 3, 4)),
    dict(scale=0.1, softcap=5.0, sliding_window=30, sinks=torch.linspace(-2, 3, 4)),
]
feature_names = [
    " ".join(given) + (str(given.get("sliding_window", ""))) or "plain" for given in FEATURES
]
BATCHES = [
    (200, None, None),
    (200, [0, 0], None),
    (70, [0, 31], None),
    (1, [3, 190], None),
    (40, [0, 7], [100, 33]),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("given", FEATURES, ids=feature_names)
@pytest.mark.parametrize(("rows", "starts", "q_start"), BATCHES)
@pytest.mark.parametrize("need_lse", [True, False])
def test_dense_is_plain_attention(
    rows: int, starts: Any, q_start: Any, given: dict, need_lse: bool
) -> None:
    q, k, v = make_qkv(200, rows, batch=2, dv=24)
    got = attend(
        make_problem(q, k, v, starts, q_start, **given), small(method="dense"), need_lse=need_lse
    )
    fields = dict(given)
    visible = causal(2, rows, 200, starts, q_start, fields.pop("sliding_window", None))
    out, lse = eager(q, k, v, visible, **fields)
    assert_near(got.out, out)
    if need_lse:
        assert_near(got.lse, lse, what="lse")
    assert (got.lse is not None) == need_lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", FEATURES[:3], ids=feature_names[:3])
def test_dense_is_as_exact_as_plain_attention(given: dict, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(200, dtype=dtype)
    got = attend(make_problem(q, k, v, **given), small(method="dense"))
    fields = dict(given)
    assert_as_exact_as(
        got.out, q, k, v, causal(1, 200, 200, sliding=fields.pop("sliding_window", None)), **fields
    )


# Gradients of the dense ways; those of the sparse path have a file of their own.


@pytest.mark.parametrize("given", FEATURES, ids=feature_names)
@pytest.mark.parametrize("starts", [None, [0, 31], [0, 60]])
@pytest.mark.parametrize("need_lse", [False, True])
def test_gradients_are_those_of_plain_attention(starts: Any, given: dict, need_lse: bool) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(60, batch=2, dtype=torch.float64))
    result = attend(
        make_problem(q, k, v, starts, **given), small(method="dense"), need_lse=need_lse
    )
    assert result.path == "dense"
    fields = {name: x for name, x in given.items() if name != "sliding_window"}
    out, lse = eager(
        q, k, v, causal(2, 60, 60, starts, sliding=given.get("sliding_window")), **fields
    )
    weight = torch.randn_like(out)
    got = torch.autograd.grad((result.out * weight).sum(), (q, k, v))
    want = torch.autograd.grad((out * weight).sum(), (q, k, v))
    assert_near(result.out.detach(), out.detach())
    for name, a, b in zip("qkv", got, want, strict=True):
        assert_near(a, b, 1e-5, f"gradient of {name}")
    if need_lse:
        assert_near(result.lse.detach(), lse.detach(), what="lse")


@pytest.mark.parametrize("given", FEATURES, ids=feature_names)
def test_gradients_do_not_meet_what_padding_holds(given: dict) -> None:
    q, k, v = make_qkv(60, batch=2, dtype=torch.float64)
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    for x in (q, k, v):
        x[1, :, :20] = torch.nan
    spoilt = [x.requires_grad_() for x in (q, k, v)]
    grads = []
    for tensors in (clean, spoilt):
        out = attend(make_problem(*tensors, [0, 20], **given), small()).out
        grads.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for name, got, want in zip(("out", "q", "k", "v"), grads[1], grads[0], strict=True):
        assert_near(got.detach(), want.detach(), 1e-12, name)


def test_sinks_that_ask_for_gradients_do_not_disturb_inference() -> None:
    """They are parameters of the model, and not every caller turns gradients off."""
    sinks = torch.nn.Parameter(torch.linspace(-2, 3, 4))
    for rows in (100, 1):
        q, k, v = make_qkv(100, rows)
        got = sparse(q, k, v, small(dense_tail=20), sinks=sinks)
        assert_near(
            got.out.detach(), sparse(q, k, v, small(dense_tail=20), sinks=sinks.detach()).out, 1e-6
        )


# What was read.


@pytest.mark.parametrize(
    ("fields", "rows", "starts"),
    [
        (dict(), 200, None),
        (dict(), 200, [0, 77]),
        (dict(), 50, [10, 160]),
        (dict(), 5, [0, 77]),
        (dict(), 1, [0, 150]),
        (dict(dense_tail=1000), 200, None),
        (dict(block_q=8, dense_tail=40), 200, [0, 40]),
        (dict(budget=400), 200, [0, 40]),
        (dict(method="streaming"), 200, [0, 40]),
        (dict(sink=0, window=0, block_k=16, block_q=5), 200, [0, 40]),
        (dict(sink=300), 200, [0, 40]),
    ],
)
def test_density_is_the_true_density(fields: dict, rows: int, starts: Any) -> None:
    said, true = densities(small(**fields), rows, starts)
    assert said == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize("dense_tail", [1, 7, 25])
def test_density_where_the_dense_tail_cuts_a_query_block(dense_tail: int) -> None:
    """Counted by query block, hence a little off."""
    said, true = densities(small(dense_tail=dense_tail), 200, None)
    assert said == pytest.approx(true, abs=0.005)


@pytest.mark.parametrize("sliding", [40, 90, 150])
def test_density_within_a_sliding_window_is_an_upper_bound(sliding: int) -> None:
    """Which of the selected keys have left a row's window is not looked at."""
    said, true = densities(small(), 200, [0, 40], sliding)
    assert true <= said <= true + 0.15


def densities(
    config: HiPConfig, rows: int, starts: Any, sliding: int | None = None
) -> tuple[float, float]:
    """The density that a call says it had, and the one that it had."""
    q, k, v = make_qkv(200, rows, batch=2)
    result = sparse(q, k, v, config, starts, sliding_window=sliding)
    read = read_mask(result.mask, config, q, k, starts, sliding=sliding)[
        :, ::2
    ]  # heads of a group read alike
    visible = causal(2, rows, 200, starts, sliding=sliding).expand_as(read)
    return result.density, int(read.sum()) / int(visible.sum())


@pytest.mark.parametrize("sliding", [None, 1, 5, 20, 100])
def test_keys_seen_by_counting(sliding: int | None) -> None:
    for first in (0, 1, 4, 5, 19, 30):
        for last in range(first, first + 25):
            want = sum(min(p + 1, sliding or p + 1) for p in range(first, last + 1))
            assert keys_seen(first, last, sliding) == want


# The entry.


def test_what_hip_attention_returns() -> None:
    q, k, v = make_qkv(100)
    config = small()
    out = hip_attention(q, k, v, config=config)
    want = sparse(q, k, v, config)
    assert_near(out, want.out, 1e-6)
    both = hip_attention(q, k, v, config=config, return_lse=True)
    assert len(both) == 2
    assert_near(both[1], want.lse, 1e-6)
    out, mask = hip_attention(q, k, v, config=config, return_mask=True)
    assert torch.equal(mask.indices, want.mask.indices)
    out, lse, mask = hip_attention(q, k, v, return_lse=True, return_mask=True)
    assert mask is None  # short: dense
    assert_near(lse, eager(q, k, v, causal(1, 100, 100))[1])


@pytest.mark.parametrize("method", ["hip", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_the_results(dtype: torch.dtype, method: str) -> None:
    q, k, v = make_qkv(100, dtype=dtype, dv=24)
    out, lse = hip_attention(q, k, v, config=small(method=method), return_lse=True)
    assert (out.dtype, out.shape) == (dtype, (1, 4, 100, 24))
    assert (lse.dtype, lse.shape) == (
        torch.float64 if dtype == torch.float64 else torch.float32,
        (1, 4, 100),
    )


def test_starts_as_lists_and_integers() -> None:
    q, k, v = make_qkv(100, 40, batch=2)
    want = hip_attention(
        q, k, v, config=small(), key_start=torch.tensor([7, 7]), q_start=torch.tensor([50, 50])
    )
    assert torch.equal(
        hip_attention(q, k, v, config=small(), key_start=[7, 7], q_start=[50, 50]), want
    )
    assert torch.equal(hip_attention(q, k, v, config=small(), key_start=7, q_start=50), want)
    assert torch.equal(
        hip_attention(q, k, v, config=small(), key_start=torch.tensor(7), q_start=torch.tensor(50)),
        want,
    )


def test_the_state_of_the_caller_s_tensors_is_left_alone() -> None:
    tensors = make_qkv(100)
    before = [x.clone() for x in tensors]
    for config in (small(), small(method="dense")):
        for given in (dict(), dict(softcap=2.0, sinks=torch.zeros(4))):
            attend(make_problem(*tensors, **given), config, need_lse=True)
    assert all(torch.equal(x, was) for x, was in zip(tensors, before, strict=True))
