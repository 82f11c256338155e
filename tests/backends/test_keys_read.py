"""The share of keys read, counted when somebody asks, against the plain sum over rows."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers import make_problem, make_qkv, small
from hypothesis import given, settings
from hypothesis import strategies as st

from hip_hf.attention import attend
from hip_hf.backends import keys_read
from hip_hf.backends.keys_read import of_blocks
from hip_hf.backends.torch import delta, sparse
from hip_hf.backends.triton import sparse as kernels
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span, keys_seen, keys_seen_at, make_query_block, query_blocks
from hip_hf.problem import AttentionProblem
from hip_hf.state import KeptSelection, RowState


def plain(
    config: HiPConfig,
    span: Span,
    dense: int,
    per_row: bool,
    sliding: int | None,
    window: int | None = None,
) -> int:
    """Keys read, query block by query block, row by row in the end; the span's rows from `dense` on
    are dense."""
    budget, read = config.budget // config.block_k, 0
    blocks = query_blocks(config, span, per_row, sliding)
    if window is not None:
        blocks = [make_query_block(config, 0, span.position, span.position, window, sliding)]
    for block in blocks:
        seen = [
            p + 1 if sliding is None else min(p + 1, sliding)
            for p in range(block.first, block.last + 1)
        ]
        fixed = (
            block.sink_end
            - block.start
            - block.window_start
            + min(block.num_candidates, budget) * config.block_k
        )
        own = min(sum(p + 1 + fixed for p in range(block.first, block.last + 1)), sum(seen))
        sparse_rows = min(max(0, dense - block.row), block.rows)
        read += own * sparse_rows // block.rows + sum(seen[sparse_rows:])
    return read


@settings(max_examples=400, deadline=None)
@given(
    position=st.integers(0, 700),
    rows=st.integers(0, 900),
    dense=st.integers(0, 900),
    block_q=st.sampled_from([1, 2, 5, 16, 24, 64]),
    block_k=st.sampled_from([1, 2, 3, 6, 16, 24, 40]),
    blocks=st.integers(1, 6),
    sink=st.integers(0, 90),
    window=st.integers(0, 200),
    sliding=st.none() | st.integers(1, 700),
    per_row=st.booleans(),
)
def test_what_is_counted_is_the_plain_sum(
    position: int, rows: int, dense: int, block_q: int, block_k: int, blocks: int, sink: int,
    window: int, sliding: int | None, per_row: bool,
) -> None:  # fmt: skip
    rows = min(rows, 16) if per_row else rows
    dense, end = rows if per_row else min(dense, rows), position + rows
    sizes = dict(block_q=block_q, block_k=block_k, budget=blocks * block_k, window=window)
    config = HiPConfig(**sizes, sink=sink, dense_tail=rows - dense)
    span = Span(0, 0, end, 0, rows, position)
    read, visible = of_blocks(config, blocks, (span,), [None], per_row, sliding)
    assert read == plain(config, span, dense, per_row, sliding)
    assert visible == plain(config, span, 0, per_row, sliding)
    if rows:
        assert keys_seen(position, end - 1, sliding) == visible


@pytest.mark.parametrize("sliding", [None, 1, 60, 5000])
def test_keys_seen_at_some_positions(sliding: int | None) -> None:
    for at in ([], [0], [3, 64, 128, 192, 256], list(range(64, 9000, 64))):
        assert keys_seen_at(at, sliding) == sum(keys_seen(p, p, sliding) for p in at)


def call(
    module: type, tokens: int, rows: int, sliding: int | None = None, **fields: int
) -> sparse.SparseAttention:
    """A call on stand-ins without memory; the sparse path's bookkeeping looks at their shapes
    only."""
    q, k = (torch.empty(1, 1, 1, 4).expand(1, 1, n, 4) for n in (rows, tokens))
    span = Span(0, 0, tokens, 0, rows, tokens - rows)
    return module(
        AttentionProblem(q, k, k, (span,), 1.0, sliding), HiPConfig(**fields), q, None, False
    )


@pytest.mark.parametrize("sliding", [None, 4000])
def test_a_million_tokens_are_walked_when_asked(
    monkeypatch: pytest.MonkeyPatch,
    sliding: int | None,
) -> None:
    """Of both backends: what a call keeps to be counted lays out no query block."""
    laid: list[Span] = []

    def lay(config: HiPConfig, span: Span, *rest: Any) -> Any:
        laid.append(span)
        return query_blocks(config, span, *rest)

    one = call(kernels.SparseAttention, 1 << 20, 1 << 20, sliding)
    span = one.problem.spans[0]
    want = plain(one.config, span, span.rows - one.config.dense_tail, False, sliding)
    monkeypatch.setattr(keys_read, "query_blocks", lay)
    count = one.count
    assert laid == []
    assert count() == (want, keys_seen(0, span.end - 1, sliding))
    assert len(laid) == 1
    settings = HiPConfig(delta=64)
    told = (one.problem, settings, one.out, None, False)
    corrected = delta.DeltaAttention(*told, attention=sparse.SparseAttention)
    assert len(laid) == 1
    plan = corrected._plan(span, None)
    assert keys_seen_at(plan.at, sliding) == sum(keys_seen(p, p, sliding) for p in plan.at)


@pytest.mark.parametrize("method", ["hip", "streaming"])
def test_steps_on_a_kept_selection_count_its_window(method: str) -> None:
    row, found, refresh = RowState(0), set(), 16
    for tokens in range(3001, 3040):
        one = call(kernels.SparseAttention, tokens, 1, method=method, decode_refresh=refresh)
        config, span = one.config, one.problem.spans[0]
        made = 3000 + (tokens - 3001) // refresh * refresh
        assert one._serves(span, row) == (made < tokens - 1)
        assert row.selection is not None
        window = row.selection.window_start
        one.windows = [window]
        assert row.selection == KeptSelection(None, window, made)
        assert window == (made - config.window) // config.block_k * config.block_k
        picked = config.budget if method == "hip" else 0
        assert one.count() == (config.sink + picked + tokens - window, tokens)
        found.add(window)
    assert len(found) == 3


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(delta=16),
        dict(method="hyper", options=dict(min_seq_len=64, block_size=32, sample_size=16)),
    ],
)
def test_what_is_kept_to_be_counted_holds_no_tensors(fields: dict[str, Any]) -> None:
    """A layer keeps it until its next call, and a model may be pickled."""
    q, k, v = make_qkv(400)
    result = attend(make_problem(q, k, v), small(**fields))
    kept = pickle.dumps(result.count)
    assert len(kept) < 4096
    assert pickle.loads(kept)() == result.count()
