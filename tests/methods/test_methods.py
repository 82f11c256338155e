"""What every method must do. A new one goes through all of it by itself; `CASES` says what is
special about some.

Each case is run at settings where its sparse code reads everything (then it is dense attention) and
at settings where it does not (then it is plain attention under the keys it says it reads, the same
however a call is padded, cut or threaded).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from helpers import (
    DECODE_ROWS,
    Starts,
    assert_as_exact_as,
    assert_near,
    causal,
    eager,
    make_problem,
    make_qkv,
    read_mask,
    small,
)

import hip_hf
from hip_hf.attention import Result, attend
from hip_hf.config import HiPConfig
from hip_hf.registry import METHODS
from hip_hf.state import DecodeState


@dataclass(frozen=True)
class Case:
    """One method with its settings, and what is true of it."""

    method: str
    covering: dict[str, Any] = field(
        default_factory=lambda: dict(budget=1000)
    )  # settings that make it read everything
    fields: dict[str, Any] = field(default_factory=dict)
    per_call: bool = (
        False  # a selection depends on the whole call: on later rows, on where a prompt is cut
    )
    masked: bool = True  # says which keys it reads
    sliding: bool = True  # serves sliding windows
    decodes: bool = True  # serves decode

    def config(self, covering: bool = False, **fields: Any) -> HiPConfig:
        return small(
            **{
                "method": self.method,
                **self.fields,
                **(self.covering if covering else {}),
                **fields,
            }
        )


HYPER = dict(min_seq_len=24, block_size=8, sample_size=8)
EXACT = dict(options=dict(min_seq_len=1000))
CASES = {
    **{method: Case(method) for method in METHODS if method != "dense"},
    "streaming": Case("streaming", dict(window=1000)),
    "vertical_slash": Case("vertical_slash", per_call=True),
    "sample": Case("sample", per_call=True, fields=dict(options=dict(rows=0.2))),
    "h2o": Case("h2o", sliding=False),
    "hyper": Case(
        "hyper",
        EXACT,
        dict(options=HYPER),
        per_call=True,
        masked=False,
        sliding=False,
        decodes=False,
    ),
    "hip+delta": Case("hip", fields=dict(delta=16), masked=False),
    "streaming+delta": Case("streaming", dict(window=1000), dict(delta=8), masked=False),
    "hyper+delta": Case(
        "hyper",
        EXACT,
        dict(options=HYPER, delta=16),
        per_call=True,
        masked=False,
        sliding=False,
        decodes=False,
    ),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FEATURES = [dict(), dict(softcap=2.0, scale=0.3), dict(sinks=True), dict(sliding_window=50)]


def features(given: dict[str, Any], heads: int) -> dict[str, Any]:
    fields = dict(given)
    if fields.pop("sinks", False):
        fields["sinks"] = torch.linspace(-2, 3, heads)
    return fields


def call(
    case: Case,
    config: HiPConfig,
    tensors: tuple[torch.Tensor, ...],
    starts: Starts = None,
    state: DecodeState | None = None,
    q_start: Starts = None,
    **fields: Any,
) -> Result:
    """A call that must take the path its case says."""
    problem = make_problem(*tensors, starts, q_start, **fields)
    result = attend(problem, config, None, state, need_lse=True, need_mask=True)
    decoding = tensors[0].shape[2] <= DECODE_ROWS
    stateless_delta = config.delta is not None and state is None
    unserved = fields.get("sliding_window") and not case.sliding
    dense = unserved or (
        decoding
        and (
            stateless_delta or not case.decodes or (fields.get("sliding_window") and state is None)
        )
    )
    assert result.path == ("dense" if dense else "sparse"), result.reason
    assert bool(result.reason) == (result.path == "dense")
    return result


def test_every_method_is_a_case() -> None:
    assert {case.method for case in CASES.values()} == METHODS.keys() - {"dense"}


@every
@pytest.mark.parametrize("given", FEATURES[:3])  # a budget that covers a sliding window goes dense
@pytest.mark.parametrize("rows", [180, 41, 3])
@pytest.mark.usefixtures("poison")
def test_reading_everything_is_dense_attention(
    case: Case, given: dict[str, Any], rows: int
) -> None:
    tensors, starts = make_qkv(180, rows, batch=2), [0, 37]
    fields = features(given, 4)
    got = call(case, case.config(covering=True), tensors, starts, **fields)
    out, lse = eager(*tensors, causal(2, rows, 180, starts), **fields)
    assert_near(got.out, out, 2e-5)
    assert_near(got.lse, lse, 2e-5, "lse")


@every
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (1, 4), (2, 7)])
@pytest.mark.parametrize(("dim", "dv"), [(16, 16), (24, 8)])
def test_head_layouts(case: Case, heads: int, groups: int, dim: int, dv: int) -> None:
    tensors = make_qkv(133, heads=heads, groups=groups, dim=dim, dv=dv)
    for shared in (True, False):
        got = call(case, case.config(covering=True, group_shared=shared), tensors)
        assert_near(got.out, eager(*tensors, causal(1, 133, 133))[0], 2e-5)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    tensors = make_qkv(133, dtype=dtype)
    got = call(case, case.config(covering=True), tensors)
    assert got.out.dtype == dtype
    assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_exact_as(got.out, *tensors, causal(1, 133, 133))
    if case.masked:
        config = case.config()
        got = call(case, config, tensors)
        assert_as_exact_as(got.out, *tensors, read_mask(got.mask, config, *tensors[:2]))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.masked],
    ids=[n for n, c in CASES.items() if c.masked],
)
@pytest.mark.parametrize(("given", "shared"), list(zip(FEATURES, [True, False] * 2, strict=True)))
@pytest.mark.parametrize("rows", [203, 40, 3])
def test_sparse_is_plain_attention_under_its_mask(
    case: Case, shared: bool, rows: int, given: dict[str, Any]
) -> None:
    tensors = make_qkv(203, rows, batch=2)
    config, starts = case.config(group_shared=shared), [0, 21]
    fields = features(given, 4)
    sliding = fields.get("sliding_window")
    got = call(case, config, tensors, starts, DecodeState(), **fields)
    assert (got.mask is None) == (got.path == "dense")
    read = causal(2, rows, 203, starts, sliding=sliding)
    if got.mask is not None:
        read = read_mask(got.mask, config, *tensors[:2], starts, sliding=sliding)
        assert got.density < 0.8 or sliding
    out, lse = eager(
        *tensors,
        read,
        **{name: value for name, value in fields.items() if name != "sliding_window"},
    )
    assert_near(got.out, out)
    assert_near(got.lse, lse, what="lse")


@every
@pytest.mark.parametrize("rows", [180, 41, 5])
def test_a_left_padded_row_gives_what_it_gives_alone(case: Case, rows: int) -> None:
    q, k, v = make_qkv(180, rows, batch=2, dtype=torch.float64)
    state = [DecodeState(), DecodeState()]
    got = call(case, case.config(), (q, k, v), [0, 37], state[0])
    own = min(rows, 143)
    alone = call(
        case, case.config(), (q[1:, :, -own:], k[1:, :, 37:], v[1:, :, 37:]), None, state[1]
    )
    assert_near(got.out[1:, :, -own:], alone.out, 1e-12)
    assert_near(got.lse[1:, :, -own:], alone.lse, 1e-12, "lse")
    assert got.density < 1 or got.path == "dense"


@every
@pytest.mark.parametrize("kept", [True, False])
def test_chunked_prefill(case: Case, kept: bool) -> None:
    """Reading everything, each chunk is dense attention; else all of it is one shot, if a selection
    knows no call."""
    q, k, v = make_qkv(251, batch=2, dtype=torch.float64)
    cuts = [0, 64, 96, 160, 251]
    for covering in (True, False):
        config = case.config(covering)
        state = DecodeState() if kept else None
        parts = [
            call(case, config, (q[:, :, first:end], k[:, :, :end], v[:, :, :end]), None, state)
            for first, end in pairwise(cuts)
        ]
        out = torch.cat([part.out for part in parts], dim=2)
        if covering:
            assert_near(out, eager(q, k, v, causal(2, 251, 251))[0], 1e-6)
        elif not case.per_call and (kept or case.method != "h2o"):  # whose history is in the state
            whole = call(case, config, (q, k, v)).out
            for first, end in pairwise(cuts):
                same = slice(
                    first, end - (config.delta or 0)
                )  # the last `delta` rows of a call are dense
                assert_near(out[:, :, same], whole[:, :, same], 1e-12)


@every
@pytest.mark.parametrize("refresh", [1, 4])
def test_decode(case: Case, refresh: int) -> None:
    """Steps on a kept state after a prefill: dense attention where everything is read; else plain
    attention under the mask."""
    q, k, v = make_qkv(140, batch=2, dtype=torch.float64)
    for covering in (True, False):
        config, state = case.config(covering, decode_refresh=refresh), DecodeState()
        call(case, config, (q[:, :, :100], k[:, :, :100], v[:, :, :100]), [0, 13], state)
        for at in range(100, 140):
            row = q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1]
            got = call(case, config, row, [0, 13], state)
            if covering or got.path == "dense":
                read = causal(2, 1, at + 1, [0, 13])
            elif case.masked and refresh == 1:
                assert got.mask is not None
                read = read_mask(got.mask, config, *row[:2], [0, 13])
                assert got.density < 0.9
            else:
                continue
            out, lse = eager(*row, read)
            assert_near(got.out, out, 1e-6)
            assert_near(got.lse, lse, 1e-6, "lse")


@pytest.mark.parametrize(
    "case",
    [c for c in CASES.values() if not c.per_call],
    ids=[n for n, c in CASES.items() if not c.per_call],
)
@pytest.mark.parametrize("changed", [48, 160])
def test_later_query_blocks_leave_earlier_rows_untouched(case: Case, changed: int) -> None:
    tensors = make_qkv(203)
    others = [
        torch.cat([x[:, :, :changed], 3 * torch.randn_like(x[:, :, changed:])], 2) for x in tensors
    ]
    got, want = (call(case, case.config(), (q, k, v)) for q, k, v in (others, tensors))
    assert torch.equal(got.out[:, :, :changed], want.out[:, :, :changed])
    assert not torch.equal(got.out[:, :, changed:], want.out[:, :, changed:])


@every
def test_threads_and_repetition_do_not_matter(case: Case, threads: Any) -> None:
    tensors = make_qkv(203, batch=2, dtype=torch.float64)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(call(case, case.config(), tensors, [0, 9]))
    for got in results[1:]:
        assert_near(got.out, results[0].out, 1e-12)
    assert torch.equal(results[3].out, results[0].out)


@every
def test_what_padding_holds_never_matters(case: Case) -> None:
    q, k, v = make_qkv(180, batch=2)
    want = call(case, case.config(), (q, k, v), [0, 21])
    for x in (q, k, v):
        x[1, :, :21] = torch.nan
    got = call(case, case.config(), (q, k, v), [0, 21])
    assert torch.equal(got.out, want.out)
    assert (got.out[1, :, :21] == 0).all()
    assert (got.lse[1, :, :21] == -torch.inf).all()


@every
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(case: Case, cache: str) -> None:
    """Greedy tokens are those of `eager` where everything is read; else generation runs, sparse,
    and says so."""
    batch = make_batch([70, 51])
    wide = {**case.fields, **case.covering}
    run = dict(do_sample=False, max_new_tokens=8, cache_implementation=cache)
    model = make_model("llama", "hip", method=case.method, **wide)
    with torch.no_grad():
        got = model.generate(**batch, **run)
        model.set_attn_implementation("eager")
        assert torch.equal(got, model.generate(**batch, **run))
        narrow = make_model("llama", "hip", method=case.method, **case.fields)
        narrow(**make_batch([120]))
        report = hip_hf.explain(narrow)
        assert [(row.method, row.path) for row in report] == [(case.method, "sparse")] * 2
        assert all(row.share is not None and row.share < 1 for row in report)
        narrow.generate(**batch, **run)
    assert [row.path for row in hip_hf.explain(narrow)] == [
        "sparse" if case.decodes else "dense"
    ] * 2
