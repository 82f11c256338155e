"""Votes by need: who votes, that nothing but need decides it, and that what is then read is read
exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import brute
import pytest
import torch
from helpers import (
    FEATURES,
    assert_as_exact_as,
    assert_near,
    eager,
    features,
    make_problem,
    make_qkv,
    read_mask,
    small,
    sparse,
)
from tree_cases import expected, layout, selected
from with_rope import EXTENDED, near_at_streaming_places, positions

from hip_hf import workers
from hip_hf.attention import Result, attend
from hip_hf.backends.torch import block_sparse
from hip_hf.backends.torch.sparse import SparseAttention
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.methods.hip import TreeSearch
from hip_hf.methods.need import Votes, asked_rows
from hip_hf.state import DecodeState

# A block has 16 rows; with this stride and two heads, 4 of 32 vote.
FEW = dict(query_stride=8, rescore=2)


# The rule, against its plain twin.


# a softcap at which the bounds of chunks stay apart: the search compares them in fp32
@pytest.mark.parametrize(
    "given", [dict(softcap=5.0) if given == dict(softcap=2.0) else given for given in FEATURES]
)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize("rows", [35, 29, 5, 1])
def test_same_blocks_with_every_feature(
    given: dict[str, Any], groups: int, group_shared: bool, rows: int
) -> None:
    """163 keys: the last query block is short, and with 29 rows the first one, too. Up to 16 rows,
    each is a block of its own."""
    config = small(**FEW, group_shared=group_shared, decode_refresh=1)
    q, k, v = make_qkv(163, rows, heads=1, groups=groups, dtype=torch.float64)
    fields, sliding = features(given, q)
    state = (
        DecodeState() if sliding else None
    )  # without one, decode within a sliding window goes dense
    got = selected(config, q, k, v, sliding_window=sliding, state=state, **fields)
    assert got == expected(config, q, k, sliding=sliding, **fields)


@pytest.mark.parametrize("block_q", [1, 48])
def test_blocks_of_one_row_and_a_rest_of_one_row(block_q: int) -> None:
    """The last of 145 rows is a query block of its own either way: all of its heads vote."""
    config = small(**FEW, block_q=block_q)
    q, k, v = make_qkv(145, 20, groups=3, dtype=torch.float64)
    assert selected(config, q, k, v) == expected(config, q, k)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Of every search: its query blocks' first positions, the votes `[heads, S * blocks, R, D]`,
    and what each reads anyway."""
    seen: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    search = TreeSearch._search

    def noted(
        self: TreeSearch, heads: slice, blocks: list, level: int, votes: Votes
    ) -> torch.Tensor:
        q, near, _ = votes
        assert near is not None
        seen.append(([block.first for block in blocks], q.clone(), near.clone()))
        return search(self, heads, blocks, level, votes)

    monkeypatch.setattr(TreeSearch, "_search", noted)
    return seen


def test_ties_go_to_the_earlier_row_then_to_the_lower_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four rows are asked, and need the candidates alike with both heads, in numbers that
    float arithmetic keeps exact; two may vote."""
    config = small(block_q=4, query_stride=4, options={"sample": 2})
    q, k = (
        torch.zeros(1, 2, 104, 16, dtype=torch.float64),
        torch.zeros(1, 1, 104, 16, dtype=torch.float64),
    )
    for head in range(2):
        for row in range(4):
            q[0, head, 100 + row, 2 * row + head] = 1
    q[..., 15] = 1
    k[
        0, 0, 100:, 15
    ] = -1e6  # the rows' own keys count for nothing: what they always read is the same for all
    seen = watched(monkeypatch)
    sparse(q[:, :, 84:], k, k, config)
    ((votes, near),) = [
        (votes[0, -1], near[0, -1]) for first, votes, near in seen if first[-1] == 100
    ]
    assert [int(vote[:8].argmax()) for vote in votes] == [2, 3]
    assert len(set(near.tolist())) == 1


@pytest.mark.parametrize(("sample", "exact"), [(2, False), (7, False), (1 << 20, True)])
@pytest.mark.parametrize("group_shared", [True, False])
def test_those_vote_who_need_most(
    sample: int,
    exact: bool,
    group_shared: bool,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
) -> None:
    """By the best of all candidate keys, or of a sample of them, and then by another choice of
    rows; the neediest half walks the tree."""
    config = small(**FEW, group_shared=group_shared, options={"sample": sample})
    q, k, v = make_qkv(331, 75, heads=2, groups=3, dtype=torch.float64)
    seen = watched(monkeypatch)
    threads(1)  # searches in order: head by head
    sparse(q, k, v, config)
    got: dict[tuple[int, int, int], torch.Tensor] = {}
    times: dict[int, int] = {}
    for firsts, votes, _ in seen:
        for i, first in enumerate(firsts):
            head = times[first] = times.get(first, -1) + 1
            for mask in range(votes.shape[1] // len(firsts)):
                got[head, mask, first] = votes[0, mask * len(firsts) + i]
    differs = False
    for head in range(2):
        for mask in range(1 if group_shared else 3):
            heads = range(3 * head, 3 * head + 3) if group_shared else [3 * head + mask]
            for block, low, high in layout(config, 75, 331):
                at = [(block[row], h) for row in brute.asked(config, len(block)) for h in heads]
                rows = torch.stack([q[0, h, p - 256] for p, h in at]) / 4
                logits = rows @ k[0, head].T
                position = torch.arange(331)
                inside = (position >= low * 4) & (position < high * 4)
                hidden = position[None] > torch.tensor([p for p, _ in at])[:, None]
                near = logits.masked_fill(inside | hidden, -torch.inf).logsumexp(-1)
                some = brute.sampled_keys(low * 4, high * 4, sample)
                need, estimate = (logits[:, keys].amax(-1) - near for keys in (inside, some))
                count = min(len(at), -(-len(heads) * 16 // 8))
                by_all, by_some = (
                    x.argsort(descending=True)[:count].tolist() for x in (need, estimate)
                )
                walking = brute.walkers(config, count) if count < len(at) else count
                placed = sorted(by_some[:walking]) + sorted(by_some[walking:])
                assert torch.equal(got[head, mask, block[0]], rows[placed]), (head, mask, block)
                differs |= set(by_all) != set(by_some)
    assert differs != exact


@pytest.mark.parametrize(
    ("stride", "rows", "want"),
    [(8, 6, [1, 3, 5]), (2, 5, [0, 2, 4]), (1, 3, [0, 1, 2]), (8, 1, [0])],
)
def test_every_second_row_is_asked(stride: int, rows: int, want: list[int]) -> None:
    assert list(asked_rows(small(query_stride=stride), rows)) == want


# However the call is made.


def assert_rows_alike(got: Result, want: Result, rows: slice) -> None:
    """The rows of the only batch row of `want` are `rows` of the last one of `got`."""
    assert_near(got.out[-1:, :, rows], want.out, 1e-12)
    assert got.lse is not None
    assert want.lse is not None
    assert_near(got.lse[-1:, :, rows], want.lse, 1e-12, "lse")


def masks_alike(got: Result, want: Result) -> bool:
    assert got.mask is not None
    assert want.mask is not None
    blocks = want.mask.counts.shape[2]
    return torch.equal(got.mask.indices[-1, :, :blocks], want.mask.indices[0])


@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize("rows", [203, 60, 3, 1])
def test_left_padding_changes_nothing(rows: int, group_shared: bool) -> None:
    config, pad = small(**FEW, group_shared=group_shared, options={"sample": 8}), 41
    q, k, v = make_qkv(203, rows, batch=2, groups=3, dtype=torch.float64)
    for x in (k, v):
        x[1, :, :pad] = torch.nan
    own = min(rows, 203 - pad)
    q[1, :, : rows - own] = torch.nan
    got = sparse(q, k, v, config, [0, pad])
    alone = sparse(q[1:, :, -own:], k[1:, :, pad:], v[1:, :, pad:], config)
    assert_rows_alike(got, alone, slice(rows - own, rows))
    assert masks_alike(got, alone)


def spans_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: HiPConfig,
    spans: list[Span],
    mask: bool,
    **fields: Any,
) -> Result:
    result = attend(
        replace(make_problem(q, k, v, **fields), spans=tuple(spans)),
        config,
        need_lse=True,
        need_mask=mask,
    )
    assert result.path == "sparse"
    return result


@pytest.mark.parametrize("real", [163, 161, 160])
def test_rows_of_padding_on_the_right_never_vote(real: int) -> None:
    """They would be in the last query block, and look for nothing but the candidates."""
    config = small(**FEW)
    q, k, v = make_qkv(200, batch=2, dtype=torch.float64)
    q[1, :, real:] = 100 * k[1, :, 60].repeat_interleave(2, 0)[:, None]
    got = spans_of(
        q, k, v, config, [Span(0, 0, 200, 0, 200, 0), Span(1, 0, real, 0, real, 0)], True
    )
    alone = sparse(q[1:, :, :real], k[1:, :, :real], v[1:, :, :real], config)
    assert_rows_alike(got, alone, slice(0, real))
    assert masks_alike(got, alone)


@pytest.mark.parametrize("given", FEATURES)
@pytest.mark.parametrize("group_shared", [True, False])
def test_packed_sequences_give_what_each_gives_alone(
    group_shared: bool, given: dict[str, Any]
) -> None:
    config, cuts = small(**FEW, group_shared=group_shared), [0, 131, 300, 383]
    q, k, v = make_qkv(383, groups=3, dtype=torch.float64)
    fields, sliding = features(given, q)
    parts = list(pairwise(cuts))
    spans = [Span(0, first, end, first, end, 0) for first, end in parts]
    got = spans_of(q, k, v, config, spans, False, sliding_window=sliding, **fields)
    for first, end in parts:
        alone = sparse(
            *(x[:, :, first:end] for x in (q, k, v)), config, sliding_window=sliding, **fields
        )
        assert_rows_alike(got, alone, slice(first, end))


@pytest.mark.parametrize("cuts", [[64], [48, 80, 208]])
@pytest.mark.parametrize("given", FEATURES)
@pytest.mark.parametrize(("kept", "group_shared"), [(True, True), (False, True), (True, False)])
def test_chunks_give_what_one_call_gives(
    cuts: list[int], kept: bool, group_shared: bool, given: dict[str, Any]
) -> None:
    config = small(**FEW, group_shared=group_shared, options={"sample": 8})
    q, k, v = make_qkv(251, groups=3, dtype=torch.float64)
    fields, sliding = features(given, q)
    whole, state = (
        sparse(q, k, v, config, sliding_window=sliding, **fields),
        DecodeState() if kept else None,
    )
    for first, end in zip([0, *cuts], [*cuts, 251], strict=True):
        keys = (x[:, :, :end] for x in (k, v))
        part = sparse(
            q[:, :, first:end], *keys, config, state=state, sliding_window=sliding, **fields
        )
        assert_near(part.out, whole.out[:, :, first:end], 1e-12)
        assert part.mask is not None
        assert whole.mask is not None
        assert torch.equal(
            part.mask.indices,
            whole.mask.indices[:, :, first // 16 : first // 16 + part.mask.indices.shape[2]],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_query_blocks_change_no_bit(dtype: torch.dtype) -> None:
    config = small(**FEW)
    q, k, v = make_qkv(331, groups=3, dtype=dtype)
    before = sparse(q, k, v, config)
    for x in (q, k, v):
        x[:, :, 208:] = 5 * torch.randn(x[:, :, 208:].shape)
    after = sparse(q, k, v, config)
    assert before.lse is not None
    assert after.lse is not None
    assert torch.equal(before.out[:, :, :208], after.out[:, :, :208])
    assert torch.equal(before.lse[:, :, :208], after.lse[:, :, :208])
    assert not torch.equal(before.out[:, :, 208:], after.out[:, :, 208:])


# Who attends to what is read anyway has no say.


NEAR, AT_SINK = 14, 15  # dimensions in which rows ask for a key of the window, and of the sink


def mostly_near(
    rows: int, needy: list[int], groups: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """300 keys and the last up to 12 queries, of which all but the `needy` attend to their window,
    or to the sink."""
    q, k, v = make_qkv(300, rows, heads=1, groups=groups, dtype=torch.float64)
    k[..., NEAR:] = 0
    k[0, 0, 1, AT_SINK] = 20
    k[0, 0, 284, NEAR] = 20
    others = [row for row in range(rows) if row not in needy]
    q[:, :, needy, NEAR:] = 0
    q[:, :, others, NEAR:] = torch.tensor([20.0, 0.0], dtype=torch.float64)
    q[:, :, others[::2], NEAR:] = torch.tensor([0.0, 20.0], dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize("few", [3, 1])
def test_rows_that_attend_near_them_do_not_change_the_selection(
    few: int, group_shared: bool
) -> None:
    """Fewer rows than may vote need the candidates: also such of the others as vote have no say."""
    config = small(**FEW, group_shared=group_shared, sink=8)
    needy = [3, 7, 11][:few]  # of those that are asked
    q, k, v = mostly_near(12, needy)
    q = torch.cat(
        [torch.randn(1, 2, 16, 16, dtype=torch.float64), q], 2
    )  # by themselves, 12 rows would be decode
    want = selected(config, q, k, v)
    last = max(n for _, n in want)
    for _ in range(4):
        others = [16 + row for row in range(12) if row not in needy]
        q[:, :, others, :NEAR] = 3 * torch.randn(1, 2, len(others), NEAR, dtype=torch.float64)
        got = selected(config, q, k, v)
        assert all(got[key] == want[key] for key in want if key[1] == last)
    q[:, :, [16 + needy[0]], :NEAR] = 3 * torch.randn(1, 2, 1, NEAR, dtype=torch.float64)
    assert any(selected(config, q, k, v)[key] != want[key] for key in want if key[1] == last), (
        "who needs the candidates has a say"
    )


def test_heads_that_attend_near_them_do_not_change_the_selection_of_a_decode_step() -> None:
    config = small(sink=8, rescore=2, decode_refresh=1)
    q, k, v = mostly_near(1, [], groups=4)
    q[:, 1, :, NEAR:] = 0  # this head alone looks farther
    alone = selected(config, q[:, 1:2], k, v)
    for _ in range(4):
        q[:, [0, 2, 3], :, :NEAR] = 3 * torch.randn(1, 3, 1, NEAR, dtype=torch.float64)
        assert selected(config, q, k, v) == alone


@pytest.mark.parametrize("row", [21, 45])
@pytest.mark.parametrize("head", [0, 1])
def test_a_single_row_finds_what_it_looks_for(row: int, head: int) -> None:
    """One of 64 that are asked; the rows that vote by their place are 7, 15, ..., 63."""
    fields = dict(block_q=64, block_k=16, budget=32, sink=16, window=64, query_stride=8, rescore=2)
    q, k, v = make_qkv(1088, 64, heads=1, dtype=torch.float64)
    k[..., NEAR:] = 0
    k[0, 0, 1, AT_SINK] = 20
    k[0, 0, 517] *= 2
    q[..., AT_SINK] = 20  # all attend to the sink, but for one
    q[0, head, row] = 3 * k[0, 0, 517]
    assert 517 // 16 in selected(small(**fields, vote="need"), q, k, v)[0, 0]
    assert 517 // 16 not in selected(small(**fields, vote="sampled"), q, k, v)[0, 0]


# What a row always reads, and what comes of it.


@pytest.mark.parametrize("trained", [36, 52, 128])
@pytest.mark.parametrize("rows", [35, 3])
@pytest.mark.parametrize("chunk_indexed", [True, False])
def test_what_is_always_read_is_weighed_in_the_places_of_attention(
    trained: int, rows: int, chunk_indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """36 and 52 positions are fewer than a row reads."""
    config, where = (
        small(**EXTENDED, decode_refresh=1),
        positions(trained, chunk_indexed, scaling=1.2),
    )
    q, k, v = make_qkv(163, rows, heads=1, dtype=torch.float64)
    seen: dict[
        int, torch.Tensor
    ] = {}  # by the row's position: rows that select for themselves come together, too
    real = SparseAttention._near

    def noted(
        self: SparseAttention, t: Any, blocks: list, asked: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, near = real(self, t, blocks, asked)
        for block, own in zip(blocks, near.split([block.rows for block in blocks], 2), strict=True):
            seen.update(zip(range(block.first, block.last + 1), own[0].unbind(1), strict=True))
        return logits, near

    monkeypatch.setattr(SparseAttention, "_near", noted)
    sparse(q, k, v, config, positions=where)
    for block, low, high in layout(config, rows, 163):
        own = q[0, :, block[0] - (163 - rows) : block[-1] + 1 - (163 - rows)].transpose(0, 1)
        want = near_at_streaming_places(config, k[0, 0], own, block, low, high, where)
        expected_near = torch.tensor(
            [[want[i, head] for i in range(len(block))] for head in range(2)], dtype=torch.float64
        )
        found = torch.stack([seen[at] for at in block], 1)
        asked = list(asked_rows(config, len(block)))
        assert found[0].isfinite().nonzero()[:, 0].tolist() == asked
        assert_near(found[:, asked], expected_near[:, asked], 1e-9, f"rows {block}")


@pytest.mark.parametrize("given", FEATURES)
@pytest.mark.parametrize(("tokens", "rows"), [(203, 203), (331, 77), (145, 17)])
@pytest.mark.parametrize(
    ("dtype", "matrices"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_the_parts_merge_to_attention_over_the_keys_of_the_mask(
    dtype: torch.dtype,
    matrices: bool,
    tokens: int,
    rows: int,
    given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`matrices`: multiplied in bf16 itself, as on CPUs with instructions for it."""
    monkeypatch.setattr(workers, "_fast_bf16", lambda: matrices)
    config = small(**FEW, decode_refresh=1)
    q, k, v = make_qkv(tokens, rows, heads=2, groups=3, dim=24, dv=13, dtype=dtype)
    fields, sliding = features(given, q)
    got = sparse(
        q, k, v, config, state=DecodeState() if sliding else None, sliding_window=sliding, **fields
    )
    assert got.mask is not None
    assert got.lse is not None
    read = read_mask(got.mask, config, q, k, sliding=sliding)
    assert_as_exact_as(got.out, q, k, v, read, **fields)
    (_, want), (_, plain) = (
        eager(q, k, v, read, dtype=of, **fields) for of in (torch.float64, dtype)
    )
    rounding = torch.finfo(got.lse.dtype).eps * float(want.abs().max())
    assert_near(got.lse, want, 2 * float((plain - want).abs().max()) + rounding, "lse")


@pytest.mark.parametrize("given", FEATURES)
@pytest.mark.parametrize("group_shared", [True, False])
def test_logits_wait_for_the_selection_in_parts(
    group_shared: bool, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    """Those of one query block at a time, and of all of a unit's."""
    config = small(**FEW, group_shared=group_shared)
    q, k, v = make_qkv(331, 331, heads=2, groups=3, dtype=torch.float64)
    fields, sliding = features(given, q)
    results = []
    for size in (1, block_sparse.NEAR_AT_ONCE):
        monkeypatch.setattr(block_sparse, "NEAR_AT_ONCE", size)
        results.append(sparse(q, k, v, config, sliding_window=sliding, **fields))
    one, other = results
    assert one.mask is not None
    assert other.mask is not None
    assert torch.equal(one.mask.indices, other.mask.indices)
    assert_near(one.out, other.out, 1e-12)
    assert one.lse is not None
    assert other.lse is not None
    assert_near(one.lse, other.lse, 1e-12, "lse")
