"""What sparse attention must equal: dense where it reads all, plain attention under the keys it
says it read, and itself however a call is padded, chunked or spread over threads. Always through
the sparse path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    FEATURES,
    assert_as_exact_as,
    assert_near,
    causal,
    eager,
    features,
    make_problem,
    make_qkv,
    read_mask,
    small,
    sparse,
)

from hip_hf import workers
from hip_hf.attention import attend
from hip_hf.backends.tensors import tensors_of
from hip_hf.backends.torch import block_sparse, dense
from hip_hf.backends.torch import sparse as sparse_module
from hip_hf.config import REPRESENTATIVES, HiPConfig
from hip_hf.geometry import make_query_block
from hip_hf.methods import pyramid
from hip_hf.problem import make_spans
from hip_hf.state import DecodeState

# tokens, dtype, (key heads, query heads for each), head dim of v, pad tokens of the second batch
# row
SHAPES = [
    (33, torch.float64, (2, 2), 16, 4),
    (97, torch.float32, (2, 1), 24, 13),
    (203, torch.bfloat16, (1, 7), 16, 37),
    (251, torch.float32, (2, 3), 8, 1),
    (180, torch.float16, (3, 2), 16, 21),
    (321, torch.bfloat16, (2, 1), 40, 150),
]
shapes = pytest.mark.parametrize(("tokens", "dtype", "heads", "dv", "pad"), SHAPES)
# of outputs of one size that are computed in another order: rounding of the dtype, and no more
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 333, 1000]


# A budget that covers the context gives dense attention.


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_covering_budget_is_dense_attention(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(tokens, batch=2, dtype=dtype)
    got = sparse(q, k, v, small(budget=1000))
    out, lse = eager(q, k, v, causal(2, tokens, tokens))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_near(got.out, out, tolerance)
    assert_near(got.lse, lse, tolerance, "lse")
    assert got.density == 1


@pytest.mark.parametrize("tokens", [17, 65, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_covering_budget_is_as_exact_as_plain_attention(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(tokens, dtype=dtype)
    assert_as_exact_as(sparse(q, k, v, small(budget=1000)).out, q, k, v, causal(1, tokens, tokens))


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (1, 1), (2, 2), (1, 4), (2, 7)])
@pytest.mark.parametrize(("dim", "dv"), [(16, 16), (24, 8), (8, 40)])
@pytest.mark.parametrize("group_shared", [True, False])
def test_a_covering_budget_is_dense_for_every_shape(
    heads: int, groups: int, dim: int, dv: int, group_shared: bool
) -> None:
    q, k, v = make_qkv(77, batch=2, heads=heads, groups=groups, dim=dim, dv=dv)
    got = sparse(q, k, v, small(budget=80, group_shared=group_shared))
    assert_near(got.out, eager(q, k, v, causal(2, 77, 77))[0])


@pytest.mark.fast
@pytest.mark.parametrize("given", [*FEATURES[:3], dict(softcap=3.0, sinks=True, scale=0.2)])
@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 13, 70], [95, 1, 100]])
@pytest.mark.parametrize("rows", [101, 37, 16, 1])
def test_a_covering_budget_is_dense_with_padding_and_every_feature(
    given: dict, starts: list[int], rows: int
) -> None:
    q, k, v = make_qkv(101, rows, batch=3)
    fields, _ = features(given, q)
    got = sparse(q, k, v, small(budget=104), starts, **fields)
    out, lse = eager(q, k, v, causal(3, rows, 101, starts), **fields)
    assert_near(got.out, out)
    assert_near(got.lse, lse, what="lse")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("heads", [slice(0, 2), slice(1, 2)])
@pytest.mark.parametrize("given", FEATURES)
def test_selecting_every_candidate_is_dense_attention(given: dict, heads: slice) -> None:
    """Block-sparse attention itself, with gathered blocks, where the identities above read one
    contiguous range."""
    config, tokens = small(), 112
    q, k, v = make_qkv(tokens)
    fields, sliding = features(given, q)
    problem = make_problem(q, k, v, sliding_window=sliding, **fields)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    t = sparse_module.tensors_of(problem, problem.spans[0], out, lse)
    for first in range(0, tokens, 16):
        block = make_query_block(config, first, first, first + 15, None, sliding)
        ids = torch.arange(block.low, block.high).expand(heads.stop - heads.start, 1, -1)
        block_sparse.attend_blocks(t.part(heads), [block], ids, config.block_k)
    own = slice(2 * heads.start, 2 * heads.stop)
    want, want_lse = eager(q, k, v, causal(1, tokens, tokens, sliding=sliding), **fields)
    assert_near(out[:, own], want[:, own])
    assert_near(lse[:, own], want_lse[:, own], what="lse")


# Sparse output is plain attention under the keys read, each of them once.


def check_reads(
    config: HiPConfig, tokens: int, rows: int | None = None, given: dict | None = None, **shape: Any
) -> None:
    starts, q_start = shape.pop("key_start", None), shape.pop("q_start", None)
    q, k, v = make_qkv(tokens, rows, **shape)
    fields, sliding = features(given or {}, q)
    state = (
        DecodeState() if sliding else None
    )  # without one, decode within a sliding window goes dense
    got = sparse(q, k, v, config, starts, q_start, state, sliding_window=sliding, **fields)
    read = read_mask(got.mask, config, q, k, starts, q_start, sliding)
    out, lse = eager(q, k, v, read, **fields)
    assert_near(got.out, out)
    assert_near(got.lse, lse, what="lse")
    again = attend(
        make_problem(q, k, v, starts, q_start, sliding_window=sliding, **fields),
        config,
        None,
        state and DecodeState(),
    )
    assert_near(again.out, out, what="out without mask")


@pytest.mark.fast
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tokens", LENGTHS)
def test_sparse_is_plain_attention_under_its_mask(tokens: int) -> None:
    check_reads(small(), tokens)


@pytest.mark.fast
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("given", FEATURES)
@pytest.mark.parametrize("rows", [None, 40, 16, 3, 1])
def test_with_every_feature(given: dict, rows: int | None) -> None:
    check_reads(small(), 203, rows, given)


@pytest.mark.fast
@pytest.mark.parametrize("method", ["hip", "streaming", "oracle"])
@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(2, 1), (1, 4), (2, 7)])
def test_with_every_method_and_head_layout(
    method: str, group_shared: bool, heads: int, groups: int
) -> None:
    check_reads(
        small(method=method, group_shared=group_shared), 131, heads=heads, groups=groups, dv=24
    )


@pytest.mark.parametrize("starts", [[0, 37, 130], [170, 200, 3]])
@pytest.mark.parametrize("rows", [200, 71, 9, 1])
def test_with_padding(starts: list[int], rows: int) -> None:
    check_reads(small(), 200, rows, batch=3, key_start=starts)


@pytest.mark.parametrize("rows", [60, 16, 1])
def test_with_unfilled_slots(rows: int) -> None:
    """A static cache: later slots hold nothing yet, and each row has come to another length."""
    check_reads(small(), 300, rows, batch=3, key_start=[0, 7, 11], q_start=[120, 240, 33])


@pytest.mark.parametrize(
    "fields",
    [
        dict(block_k=1, budget=7, sink=3, window=5),
        dict(block_k=16, budget=32, sink=20, window=30, block_q=64),
        dict(sink=0, window=0),
        dict(block_q=7, query_stride=3),
        dict(block_q=1),
        dict(block_q=512),
        dict(dense_tail=16),
        dict(dense_tail=21),
        dict(dense_tail=1000),
        *[dict(representative=name, rescore=2) for name in REPRESENTATIVES],
    ],
)
def test_with_odd_settings(fields: dict) -> None:
    check_reads(small(**fields), 219)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_as_exact_as_plain_attention(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(203, dtype=dtype)
    got = sparse(q, k, v, small())
    assert_as_exact_as(got.out, q, k, v, read_mask(got.mask, small(), q, k))


def test_tensors_that_are_not_contiguous() -> None:
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(203, dtype=torch.float64)
    )
    got, want = sparse(q, k, v, small()), sparse(*(x.contiguous() for x in (q, k, v)), small())
    assert_near(got.out, want.out, 1e-12)


# Sliding windows.


@pytest.mark.parametrize("block_q", [4, 6, 8, 16])
@pytest.mark.parametrize("sliding", [34, 35, 41, 47, 48, 49, 50, 51])
def test_every_query_block_is_computed_in_a_sliding_window(block_q: int, sliding: int) -> None:
    """There may then be one candidate less from one query block to the next."""
    check_reads(
        small(block_q=block_q, block_k=16, budget=16, sink=0),
        150,
        None,
        dict(sliding_window=sliding),
    )


def test_the_sink_is_read_as_long_as_it_is_in_sight() -> None:
    check_reads(small(sink=32), 203, None, dict(sliding_window=90))


# The same numbers, however the call is made.


@pytest.mark.parametrize("pad", [1, 4, 37])
@pytest.mark.parametrize("rows", [None, 50, 5])
@pytest.mark.parametrize("given", FEATURES)
def test_a_left_padded_row_gives_what_it_gives_alone(
    pad: int, rows: int | None, given: dict
) -> None:
    q, k, v = make_qkv(180, rows, batch=2, dtype=torch.float64)
    fields, sliding = features(given, q)
    state = [DecodeState() if sliding else None for _ in range(2)]
    got = sparse(q, k, v, small(), [0, pad], state=state[0], sliding_window=sliding, **fields)
    own = min(q.shape[2], 180 - pad)
    row = (q[1:, :, -own:], k[1:, :, pad:], v[1:, :, pad:])
    alone = sparse(*row, small(), state=state[1], sliding_window=sliding, **fields)
    assert_near(got.out[1:, :, -own:], alone.out, 1e-12)
    assert_near(got.lse[1:, :, -own:], alone.lse, 1e-12, "lse")
    blocks = alone.mask.counts.shape[2]
    for name in ("indices", "counts", "first"):
        mine, want = getattr(got.mask, name)[1], getattr(alone.mask, name)[0]
        assert torch.equal(
            mine[..., :blocks, :] if name == "indices" else mine[..., :blocks], want
        ), name


def shaped(
    tokens: int, dtype: torch.dtype, heads: tuple[int, int], dv: int
) -> tuple[torch.Tensor, ...]:
    return make_qkv(tokens, batch=2, heads=heads[0], groups=heads[1], dv=dv, dtype=dtype)


@shapes
def test_a_left_padded_row_of_any_shape_gives_what_it_gives_alone(
    tokens: int, dtype: torch.dtype, heads: tuple[int, int], dv: int, pad: int
) -> None:
    q, k, v = shaped(tokens, dtype, heads, dv)
    got = sparse(q, k, v, small(), [0, pad])
    alone = sparse(q[1:, :, pad:], k[1:, :, pad:], v[1:, :, pad:], small())
    assert_near(got.out[1:, :, pad:], alone.out, ROUNDING[dtype])
    assert_near(got.lse[1:, :, pad:], alone.lse, ROUNDING[dtype], "lse")
    blocks = alone.mask.counts.shape[2]
    assert torch.equal(got.mask.indices[1, :, :blocks], alone.mask.indices[0])


@shapes
def test_chunked_prefill_of_any_shape_is_one_shot(
    tokens: int, dtype: torch.dtype, heads: tuple[int, int], dv: int, pad: int
) -> None:
    """Chunks end where query blocks of the padded row do."""
    q, k, v = shaped(tokens, dtype, heads, dv)
    q, k, v = (x[1:] for x in (q, k, v))
    want, state, out = sparse(q, k, v, small(), [pad]), DecodeState(), []
    cuts = [pad + at for at in range(48, tokens - pad - 16, 48)]
    for first, end in zip([0, *cuts], [*cuts, tokens], strict=True):
        part = sparse(q[:, :, first:end], k[:, :, :end], v[:, :, :end], small(), [pad], state=state)
        out.append(part.out)
    assert_near(torch.cat(out, 2), want.out, ROUNDING[dtype])


@pytest.mark.parametrize("rest", [1, 9, 16])
@pytest.mark.parametrize("kept", [True, False])
def test_a_short_last_chunk_is_decode(rest: int, kept: bool) -> None:
    """Up to 16 rows count as decode: each is the step that selects for itself, and not the row of
    one shot."""
    q, k, v = make_qkv(160 + rest, batch=2, dtype=torch.float64)
    config, state = small(decode_refresh=1), DecodeState() if kept else None
    whole = sparse(q, k, v, config)
    if state is not None:
        sparse(q[:, :, :160], k[:, :, :160], v[:, :, :160], config, state=state)
    chunk = sparse(q[:, :, 160:], k, v, config, state=state)
    for row in range(rest):
        end = 161 + row
        step = sparse(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], config)
        assert_near(chunk.out[:, :, row : row + 1], step.out, 1e-12)
        assert torch.equal(chunk.mask.indices[:, :, row], step.mask.indices[:, :, 0])
    if rest == 1:  # the query block of one shot is that row alone, too
        assert_near(chunk.out, whole.out[:, :, 160:], 1e-12)


@pytest.mark.parametrize("cuts", [[64], [32, 64, 160], [16 * i for i in range(2, 16, 2)], [160]])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_chunked_prefill_is_one_shot(cuts: list[int], kept: bool, static: bool) -> None:
    q, k, v = make_qkv(251, batch=2, dtype=torch.float64)
    want = sparse(q, k, v, small())
    state, out, lse = DecodeState() if kept else None, [], []
    for first, end in zip([0, *cuts], [*cuts, 251], strict=True):
        seen = (
            251 if static else end
        )  # a static cache has all slots; what is in the later ones must not matter
        later = torch.arange(seen)[:, None] >= end
        keys, values = (x[:, :, :seen].masked_fill(later, torch.nan) for x in (k, v))
        part = sparse(q[:, :, first:end], keys, values, small(), q_start=[first] * 2, state=state)
        out.append(part.out)
        lse.append(part.lse)
    assert_near(torch.cat(out, 2), want.out, 1e-12)
    assert_near(torch.cat(lse, 2), want.lse, 1e-12, "lse")


@pytest.mark.fast
@shapes
def test_a_decode_step_is_the_last_row_of_a_prefill(
    tokens: int, dtype: torch.dtype, heads: tuple[int, int], dv: int, pad: int
) -> None:
    """Where the last query block is that one row: of as many tokens as make it so, padding not
    counted."""
    tokens = (tokens - pad) // 16 * 16 + 1 + pad
    q, k, v = (x[1:] for x in shaped(tokens, dtype, heads, dv))
    config = small(decode_refresh=1)
    whole = sparse(q, k, v, config, [pad])
    step = sparse(q[:, :, -1:], k, v, config, [pad], state=DecodeState())
    assert_near(step.out, whole.out[:, :, -1:], ROUNDING[dtype])
    assert_near(step.lse, whole.lse[:, :, -1:], ROUNDING[dtype], "lse")
    last = int(whole.mask.first[0].argmax())
    assert torch.equal(step.mask.indices[:, :, 0], whole.mask.indices[:, :, last])


@shapes
@pytest.mark.parametrize("dense_tail", [0, 20])
def test_later_query_blocks_leave_earlier_rows_untouched(
    tokens: int, dtype: torch.dtype, heads: tuple[int, int], dv: int, pad: int, dense_tail: int
) -> None:
    tensors = shaped(tokens, dtype, heads, dv)
    config = small(dense_tail=dense_tail)
    want = sparse(*tensors, config, [0, pad])
    for block in {1, (tokens - pad) // 32, (tokens - pad - 1) // 16} - {0}:
        for row, start in enumerate((0, pad)):
            at = start + 16 * block
            others = [
                torch.cat([x[:, :, :at], 3 * torch.randn_like(x[:, :, at:])], 2) for x in tensors
            ]
            got = sparse(*others, config, [0, pad])
            assert torch.equal(got.out[row, :, :at], want.out[row, :, :at])
            assert torch.equal(got.lse[row, :, :at], want.lse[row, :, :at])
            assert not torch.equal(got.out[row, :, at:], want.out[row, :, at:])


CUTS = [
    (sparse_module, "BLOCKS_AT_ONCE", 1),
    (sparse_module, "BLOCKS_AT_ONCE", 5),
    (sparse_module, "FEWEST_BLOCKS", 1),
    (pyramid, "BLOCKS_AT_ONCE", 3),
    (block_sparse, "LOGITS_AT_ONCE", 1),
    (block_sparse, "LOGITS_AT_ONCE", 1000),
    (dense, "ROWS_AT_ONCE", 7),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("module", "name", "value"), CUTS)
@pytest.mark.parametrize("given", [FEATURES[0], FEATURES[-1]])
def test_how_the_work_is_cut_does_not_matter(
    module: Any, name: str, value: int, given: dict, monkeypatch: Any
) -> None:
    q, k, v = make_qkv(203, dtype=torch.float64)
    fields, sliding = features(given, q)
    config = small(dense_tail=30)
    want = sparse(q, k, v, config, sliding_window=sliding, **fields)
    monkeypatch.setattr(module, name, value)
    got = sparse(q, k, v, config, sliding_window=sliding, **fields)
    assert_near(got.out, want.out, 1e-12)
    assert_near(got.lse, want.lse, 1e-12, "lse")
    assert torch.equal(got.mask.indices, want.mask.indices)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sliding", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_without_a_log_sum_exp_are_merged_exactly(
    sliding: int | None, dtype: torch.dtype, monkeypatch: Any
) -> None:
    monkeypatch.setattr(block_sparse, "LOGITS_AT_ONCE", 1)
    q, k, v = make_qkv(203, 40, dtype=dtype)
    problem = make_problem(q, k, v, sliding_window=sliding)
    out = torch.full_like(q, torch.nan)
    dense.attend_rows(tensors_of(problem, problem.spans[0], out, None), 0, problem.spans[0])
    assert_as_exact_as(out, q, k, v, causal(1, 40, 203, sliding=sliding))


def test_each_worker_computes_alone() -> None:
    """A worker whose products are spread over threads of their own competes with the other
    workers."""
    counts = []
    workers.run(lambda _: counts.append(torch.get_num_threads()), range(4), torch.device("cpu"))
    assert counts == [1] * 4


def test_how_many_threads_work_does_not_matter(threads: Any) -> None:
    q, k, v = make_qkv(203, batch=2, dtype=torch.float64)
    config = small(dense_tail=30)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(sparse(q, k, v, config))
        assert torch.get_num_threads() == count
    for got in results[1:]:
        assert_near(got.out, results[0].out, 1e-12)
        assert torch.equal(got.mask.indices, results[0].mask.indices)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [203, 1])
def test_inference_mode(count: int, rows: int, threads: Any) -> None:
    """Also where the workers are other threads than the one that is in inference mode."""
    q, k, v = make_qkv(203, rows, dtype=torch.float64)
    want = sparse(q, k, v, small(dense_tail=30))
    threads(count)
    with torch.inference_mode():
        got = sparse(q, k, v, small(dense_tail=30))
    assert_near(got.out, want.out, 1e-12)


# Padding.


def test_rows_without_a_key_give_nothing() -> None:
    q, k, v = make_qkv(150, batch=3)
    got = sparse(q, k, v, small(dense_tail=10), [0, 33, 150])
    for b, pad in ((1, 33), (2, 150)):
        assert (got.out[b, :, :pad] == 0).all()
        assert (got.lse[b, :, :pad] == -torch.inf).all()
    assert got.out.isfinite().all()
    assert (got.mask.first[2] == -1).all()
    assert (got.mask.counts[2] == 0).all()


def test_a_batch_without_any_key_gives_nothing() -> None:
    q, k, v = make_qkv(40, batch=2)
    got = attend(make_problem(q, k, v, [40, 40]), small(), need_lse=True, need_mask=True)
    assert make_spans(q, k, torch.tensor([40, 40])) == ()
    assert (got.out == 0).all()
    assert (got.lse == -torch.inf).all()


@pytest.mark.parametrize("rows", [180, 30, 5])
@pytest.mark.parametrize("method", ["hip", "oracle", "dense"])
def test_what_padding_holds_never_matters(rows: int, method: str) -> None:
    q, k, v = make_qkv(180, rows, batch=2)
    config, starts, q_start = (
        small(method=method),
        [0, 21],
        [170 - rows, 165 - rows] if rows < 170 else None,
    )
    want = attend(make_problem(q, k, v, starts, q_start), config, need_lse=True)
    ends = [180, 180] if q_start is None else [170, 165]
    for b in range(2):
        for x in (k, v):
            x[b, :, : starts[b]] = x[b, :, ends[b] :] = torch.nan
        q[b, :, : max(0, starts[b] - (ends[b] - rows))] = torch.nan
    got = attend(make_problem(q, k, v, starts, q_start), config, need_lse=True)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)
