"""Delta correction: the formula, row by row; anchors; decode; it corrects what changes slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, causal, eager, make_problem, make_qkv, small

from hip_hf.attention import attend
from hip_hf.backends.base import Result
from hip_hf.backends.delta import anchors
from hip_hf.registry import METHODS
from hip_hf.state import DecodeState


def written_down(
    q: Any, k: Any, v: Any, gamma: int, start: int = 0, **fields: Any
) -> tuple[torch.Tensor, ...]:
    """Corrected output and log-sum-exp of one call, from sparse and dense results, in loops."""
    problem = make_problem(q, k, v, [start])
    sparse = attend(problem, small(**fields), need_lse=True)
    dense = eager(q, k, v, causal(1, q.shape[2], k.shape[2], [start]))
    results = []
    first = k.shape[2] - q.shape[2] - start  # position of the first row
    for s, d in zip((sparse.out, sparse.lse), dense, strict=True):
        d = d.to(s.dtype)
        out, difference = s.clone(), d - s
        row_of = {
            position: position - first for position in range(max(first, 0), first + q.shape[2])
        }
        end = first + q.shape[2] - gamma
        at = sorted(
            {max(first, 0), *(p for p in row_of if p % gamma == 0)} & {p for p in row_of if p < end}
        )
        for p, row in row_of.items():
            if p >= end:
                out[:, :, row] = d[:, :, row]
                continue
            j = max(a for a in at if a <= p)
            out[:, :, row] += difference[:, :, row_of[j]]
        results.append(out)
    return tuple(results)


@pytest.mark.parametrize(
    ("tokens", "rows", "start"), [(203, 203, 0), (203, 60, 0), (203, 203, 37), (140, 20, 0)]
)
@pytest.mark.parametrize("gamma", [1, 7, 16, 300])
@pytest.mark.parametrize("method", ["hip", "streaming"])
def test_the_formula(tokens: int, rows: int, start: int, gamma: int, method: str) -> None:
    q, k, v = make_qkv(tokens, rows, dtype=torch.float64)
    got = attend(
        make_problem(q, k, v, [start]),
        small(method=method, delta=gamma),
        need_lse=True,
        need_mask=True,
    )
    assert (got.path, got.reason) == ("sparse", "")
    assert got.mask is not None
    out, lse = written_down(q, k, v, gamma, start, method=method)
    real = slice(max(0, start - (tokens - rows)), None)
    assert_near(got.out[:, :, real], out[:, :, real], 1e-12)
    assert_near(got.lse[:, :, real], lse[:, :, real], 1e-12, "lse")
    assert 0 < got.density <= 1


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"dense"}))
@pytest.mark.parametrize("fields", [dict(), dict(softcap=2.0, sinks=True)])
def test_gamma_1_is_dense(method: str, fields: dict[str, Any]) -> None:
    tensors = make_qkv(203, batch=2)
    given = {**fields, "sinks": torch.linspace(-2, 3, 4)} if fields else {}
    options = dict(min_seq_len=32, block_size=8, sample_size=8) if method == "hyper" else {}
    config, state = small(method=method, options=options, delta=1), DecodeState()
    got = attend(make_problem(*tensors, [0, 21], **given), config, None, state, need_lse=True)
    out, lse = eager(*tensors, causal(2, 203, 203, [0, 21]), **given)
    assert got.density == 1
    assert_near(got.out, out)
    assert_near(got.lse, lse, what="lse")


def test_with_a_sliding_window() -> None:
    tensors = make_qkv(203)
    got = attend(make_problem(*tensors, sliding_window=70), small(delta=1), need_lse=True)
    assert got.path == "sparse"
    assert_near(got.out, eager(*tensors, causal(1, 203, 203, sliding=70))[0])


@pytest.mark.parametrize("cut", [64, 70, 100])
def test_decode_goes_on_as_prefill_would(cut: int, threads: Any) -> None:
    """With every row its own query block, a step after a prefill gives what the row gives in one
    long prefill, once it has passed an anchor: the rows in between have their own first row for
    anchor."""
    threads(1)  # a step is too small to share out
    q, k, v = make_qkv(160, batch=2, dtype=torch.float64)
    config = small(delta=16, decode_refresh=1, block_q=1, query_stride=1)
    whole = attend(make_problem(q, k, v, [0, 5]), config, need_lse=True)
    state = DecodeState()
    attend(make_problem(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], [0, 5]), config, None, state)
    compared = 0
    for at in range(cut, 144 - 5):  # the last rows of `whole` are dense
        got = attend(
            make_problem(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], [0, 5]),
            config,
            None,
            state,
            True,
        )
        assert got.path == "sparse"
        for b, pad in enumerate((0, 5)):
            if (at - pad) // 16 > (cut - pad - 1) // 16:
                compared += 1
                assert_near(got.out[b], whole.out[b, :, at : at + 1], 1e-12)
                assert_near(got.lse[b], whole.lse[b, :, at : at + 1], 1e-12, "lse")
    assert compared > 50


def test_a_cropped_cache_forgets_the_correction() -> None:
    q, k, v = make_qkv(100, dtype=torch.float64)
    config, state = small(delta=16, decode_refresh=1), DecodeState()
    attend(make_problem(q[:, :, :90], k[:, :, :90], v[:, :, :90]), config, None, state)

    def step(at: int) -> Result:
        problem = make_problem(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1])
        return attend(problem, config, None, state)

    assert step(90).density == 1  # the first row of its group since the prefill: dense
    assert step(91).density < 1
    state.crop(91)
    assert step(91).density == 1
    state.reorder([0, 0])
    assert state.rows[1].correction is state.rows[0].correction is not None


def test_stateless_decode_is_dense_and_says_so() -> None:
    q, k, v = make_qkv(100)
    got = attend(make_problem(q[:, :, -1:], k, v), small(delta=16))
    assert (got.path, got.reason) == ("dense", "Delta correction of a decode step needs kept state")


def test_anchors() -> None:
    assert anchors(0, 40, 16, None) == [0, 16, 32]
    assert anchors(5, 40, 16, None) == [5, 16, 32]
    assert anchors(5, 40, 16, 0) == [16, 32]
    assert anchors(21, 22, 16, 0) == [21]
    assert anchors(21, 22, 16, 17) == []
    assert anchors(40, 40, 16, None) == []


def test_it_corrects_what_changes_slowly() -> None:
    """Queries that drift slowly over values that streaming misses: the error falls by more than
    half."""
    _, k, v = make_qkv(400, dim=16)
    t = torch.linspace(0, 1, 400)[:, None]
    base = torch.randn(2, 4, 1, 16)
    q = (base[0] * torch.cos(t) + base[1] * torch.sin(t))[None]
    want = eager(q, k, v, causal(1, 400, 400))[0]
    miss = [
        float(
            (
                attend(make_problem(q, k, v), small(method="streaming", delta=delta)).out - want
            ).norm()
        )
        for delta in (None, 16)
    ]
    assert miss[1] < miss[0] / 2
