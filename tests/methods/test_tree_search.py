"""The tree search against its plain twin (`hip_hf/methods/naive.py`), and the promises that its
description makes."""

from __future__ import annotations

import itertools
from typing import Any

import brute
import pytest
import torch
from helpers import make_qkv, small, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_cases import check, layout, selected

from hip_hf.config import REPRESENTATIVES, HiPConfig
from hip_hf.methods import hip, ranking
from hip_hf.state import DecodeState

# 99 and 163 keys with the last query rows only: the searches are long, the loops of the plain twin
# are not.


@pytest.mark.fast
@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_same_blocks_for_every_representative(representative: str, score: str) -> None:
    check(small(representative=representative, score=score), 163, 35)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": 0.25}, {"weight": 1.0}])
def test_same_blocks_for_every_weight(options: dict[str, float]) -> None:
    check(small(options=options, sink=0), 131, 20)


@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("beam", [1, 2, 4])
@pytest.mark.parametrize("rescore", [1, 2, 4])
@pytest.mark.parametrize("coarsest", [None, 4, 16])
def test_same_blocks_for_every_shape_of_the_tree(
    beam: int, rescore: int, coarsest: int | None, score: str
) -> None:
    check(small(beam=beam, rescore=rescore, coarsest=coarsest, score=score, budget=8), 163, 19)


@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("fields", [
    dict(), dict(group_shared=False), dict(vote="sampled"), dict(coarsest=4),
    dict(block_k=3, budget=12), dict(options={"onward": 1}), dict(query_stride=8),
    dict(query_stride=8, group_shared=False), dict(query_stride=16),
])  # fmt: skip
def test_same_blocks_where_few_candidates_are_looked_at_whole(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], score: str
) -> None:
    """Those of up to 16 blocks, twice `beam`; the longer ones of the same call are walked
    through."""
    counts: dict[str, list[int]] = {}
    for name in ("_whole", "_search"):
        original = getattr(hip.TreeSearch, name)

        def count(
            self: Any,
            heads: Any,
            blocks: list,
            *rest: Any,
            name: str = name,
            original: Any = original,
        ) -> torch.Tensor:
            counts.setdefault(name, []).extend(block.num_candidates for block in blocks)
            return original(self, heads, blocks, *rest)

        monkeypatch.setattr(hip.TreeSearch, name, count)
    check(small(rescore=2, score=score, **fields), 150, 120)
    assert max(counts["_whole"]) <= 16 < min(counts["_search"]), counts


@pytest.mark.parametrize("score", ["mass", "max"])
def test_votes_that_are_too_many_at_once_are_scored_after_one_another(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hip, "VOTES_AT_ONCE", 1)  # a vote at a time
    counts: list[int] = []
    original = hip.aggregate

    def counted(logits: torch.Tensor, *given: Any) -> torch.Tensor:
        counts.append(logits.shape[-2])
        return original(logits, *given)

    monkeypatch.setattr(hip, "aggregate", counted)
    check(small(rescore=2, score=score), 60, 40)
    assert counts == [1] * len(counts) != []


@pytest.mark.parametrize("rows", [1, 16])
def test_nothing_hides_a_key_of_few_candidates(rows: int) -> None:
    """The summaries of eleven blocks promise much that is in none of their keys; only one block has
    what all rows look for."""
    q, k, v = make_qkv(84, rows, dtype=torch.float64)
    q.zero_()[..., :2] = 1.0
    k.zero_()
    k[:, :, 4:48:2, :2], k[:, :, 5:48:2, :2] = (
        torch.tensor([90.0, -90.0]).double(),
        torch.tensor([-90.0, 90.0]).double(),
    )
    k[:, :, 49, :2] = 30.0
    for rescore, found in ((1, False), (2, True)):
        blocks = selected(small(rescore=rescore), q, k, v)
        assert all((49 // 4 in some) == found for some in blocks.values()), (rescore, blocks)


@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize("query_stride", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("vote", ["need", "sampled"])
def test_same_blocks_for_every_choice_of_votes(
    query_stride: int, vote: str, group_shared: bool
) -> None:
    check(small(query_stride=query_stride, vote=vote, group_shared=group_shared), 99, 99)


@pytest.mark.parametrize("sample", [2, 3, 16, 64, 1000])
def test_same_blocks_for_every_sample_of_the_candidates(sample: int) -> None:
    check(small(options={"sample": sample}, query_stride=8), 163, 35)


@pytest.mark.parametrize("descent", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("query_stride", [1, 2, 5])
def test_same_blocks_for_every_share_of_votes_that_walk_the_tree(
    query_stride: int, descent: int
) -> None:
    check(
        small(options={"descent": descent}, query_stride=query_stride, rescore=2, beam=1), 163, 35
    )


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("group_shared", [True, False])
def test_same_blocks_for_every_head_layout(heads: int, groups: int, group_shared: bool) -> None:
    check(small(group_shared=group_shared), 131, 20, heads=heads, groups=groups)


@pytest.mark.parametrize("tokens", [47, 48, 49, 63, 64, 65, 127, 128, 129, 200])
def test_same_blocks_for_odd_lengths(tokens: int) -> None:
    check(small(budget=8, beam=1), tokens, 40)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("refresh", [1, 8])
@pytest.mark.parametrize(
    "fields",
    [dict(), dict(group_shared=False, rescore=2), dict(budget=32, score="max"), dict(budget=4)],
)
@pytest.mark.parametrize("rows", [1, 2, 15, 16])
def test_same_blocks_in_decode_where_each_row_selects_for_itself(
    rows: int, fields: dict, refresh: int, keep: bool
) -> None:
    check(small(**{"rescore": 2, "decode_refresh": refresh, **fields}), 163, rows, keep=keep)


@pytest.mark.parametrize(
    ("tokens", "rows", "fields"),
    [(129, 129, {}), (60, 60, dict(block_q=1, budget=8)), (150, 5, {}), (150, 1, {})],
)
def test_only_selections_that_are_kept_read_on(tokens: int, rows: int, fields: dict) -> None:
    """Not a prompt's last query block of one row, nor a step without state, nor the rows of a
    verification."""
    q, k, v = make_qkv(tokens, rows)
    once, often = (selected(small(decode_refresh=refresh, **fields), q, k, v) for refresh in (1, 8))
    assert once == often


@pytest.mark.parametrize(
    "fields",
    [
        dict(block_k=1, budget=8, sink=0),
        dict(block_k=3, budget=12, sink=5, window=10),
        dict(block_k=8, budget=16, window=0, sink=20),
        dict(block_k=16, budget=32, block_q=5, window=7),
        dict(block_q=64, query_stride=7),
    ],
)
def test_same_blocks_for_odd_sizes(fields: dict[str, int]) -> None:
    check(small(**fields), 163, 35)


@pytest.mark.fast
@pytest.mark.parametrize("score", ["mass", "max"])
def test_same_blocks_under_a_softcap(score: str) -> None:
    check(small(score=score, rescore=2), 131, 20, softcap=1.5)


# What is ever a candidate.


class Recorder:
    """Notes every call of `best`: the candidates, level by level."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[torch.Tensor] = []
        original = ranking.best

        def best(scores: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
            # one that a larger chunk covers has no score
            self.ids.append(ids.masked_fill(scores == -torch.inf, ranking.NO_CHUNK))
            return original(scores, ids, count)

        monkeypatch.setattr(hip, "best", best)

    def levels(self) -> list[tuple[int, torch.Tensor]]:
        """(level, ids) of a single search, from the coarsest level down."""
        return [(len(self.ids) - 1 - i, ids) for i, ids in enumerate(self.ids)]


def blocks_of(level: int, index: int) -> range:
    return range(index << level, (index + 1) << level)


SHAPES = [
    dict(budget=8, beam=1),
    dict(budget=8, beam=2, coarsest=16),
    dict(budget=4, beam=1, sink=0),
    dict(budget=16, beam=1),
]


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("tokens", [61, 100, 163, 255, 256, 257, 300])
def test_the_first_candidates_cover_every_searched_block_once(
    tokens: int, fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real code's candidates: all of the start level, then at each level the last two, which
    are nobody's children."""
    config = small(decode_refresh=1, **fields)
    (_, low, high), *_ = layout(config, 1, tokens)
    recorder = Recorder(monkeypatch)
    q, k, v = make_qkv(tokens, 1, heads=1)
    sparse(q, k, v, config)
    covered: list[int] = []
    for i, (level, ids) in enumerate(recorder.levels()):
        for index in (ids if i == 0 else ids[..., -2:]).flatten().tolist():
            if index != ranking.NO_CHUNK:
                covered += blocks_of(level, index)
    assert sorted(covered) == list(range(low, high))
    twin = brute.Search(config, k[0, 0], [], low, high, 1.0)
    assert sorted(
        b for level, index in brute.initial(twin) for b in blocks_of(level, index)
    ) == list(range(low, high))
    assert len(recorder.ids) == twin.start() + 1


@pytest.mark.fast
@pytest.mark.parametrize("low", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("beam", [1, 2, 3])
@pytest.mark.parametrize("coarsest", [None, 1, 4, 32])
def test_the_dyadic_cover_of_any_searched_range(low: int, beam: int, coarsest: int | None) -> None:
    config = small(block_k=1, budget=2, beam=beam, coarsest=coarsest)
    for high in range(low + 3, low + 140):
        twin = brute.Search(config, torch.empty(0, 1), [], low, high, 1.0)
        initial = brute.initial(twin)
        assert sorted(b for level, index in initial for b in blocks_of(level, index)) == list(
            range(low, high)
        )
        assert all(len(twin.edges(level)) <= 2 for level in range(twin.start()))
        assert hip.start_level(config, low, high) == twin.start()
        # there is always a whole beam to keep
        assert all(
            len(twin.complete(level)) >= config.beam_blocks for level in range(1, twin.start() + 1)
        )


@pytest.mark.parametrize("sliding", [None, 60, 90])
@pytest.mark.parametrize("fields", SHAPES)
def test_no_candidate_reaches_out_of_the_searched_range(
    fields: dict[str, int], sliding: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(decode_refresh=1, **fields)
    q, k, v = make_qkv(300, 1, heads=1)
    recorder = Recorder(monkeypatch)
    for tokens in range(70, 300, 7):
        recorder.ids.clear()
        sparse(
            q,
            k[:, :, :tokens],
            v[:, :, :tokens],
            config,
            state=DecodeState(),
            sliding_window=sliding,
        )
        position, window = tokens - 1, (tokens - 1 - config.window) // config.block_k
        oldest = 0 if sliding is None else max(0, position - sliding + 1)
        low = max(-(-config.sink // config.block_k), oldest // config.block_k)
        for level, ids in recorder.levels():
            for index in set(ids.flatten().tolist()) - {ranking.NO_CHUNK}:
                inside = blocks_of(level, index)
                assert low <= inside.start < inside.stop <= window, (
                    f"level {level}: {inside} leaves {low} to {window}"
                )


# Order.


@pytest.mark.fast
def test_ties_break_by_position() -> None:
    """Every key alike, in numbers that float arithmetic keeps exact."""
    q, k, v = make_qkv(300, 1, dtype=torch.float64)
    q, k = torch.ones_like(q), torch.ones_like(k)
    for score, representative in itertools.product(("mass", "max"), REPRESENTATIVES):
        config = small(
            score=score, representative=representative, sink=12, rescore=2, options={"onward": 0}
        )
        first = config.sink // config.block_k
        got = selected(config, q, k, v)
        assert got == {(head, 0): list(range(first, first + 4)) for head in range(2)}, (
            score,
            representative,
        )


def test_a_block_that_follows_a_good_one_is_better_than_a_lone_one() -> None:
    scores, ids = (
        torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.0]]),
        torch.tensor([[3, 4, 9, ranking.NO_CHUNK - 1, ranking.NO_CHUNK]]),
    )
    ranking.read_on(scores, ids, 0.5)
    torch.testing.assert_close(scores, torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0]]))


def test_what_a_row_looks_up_is_read_on_into_the_next_block() -> None:
    """All rows need block 9 most, block 20 a little less, and nobody block 10, which follows block
    9."""
    q, k, v = make_qkv(300, 1)
    k.zero_(), q.zero_()
    q[..., 0], k[:, :, 9 * 4 : 10 * 4, 0], k[:, :, 20 * 4 : 21 * 4, 0] = 8.0, 8.0, 7.0
    blocks = {}
    for onward in (0.0, 0.3):
        config = small(budget=8, sink=4, rescore=30, beam=30, options={"onward": onward})
        assert config.block_k == 4
        blocks[onward] = set(map(tuple, selected(config, q, k, v).values()))
    assert blocks == {0.0: {(9, 20)}, 0.3: {(9, 10)}}


def test_the_same_call_selects_the_same_blocks() -> None:
    q, k, v = make_qkv(300)
    assert selected(small(), q, k, v) == selected(small(), q, k, v)


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan])
        | st.floats(width=32),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 45),
    st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_best_is_what_sorting_finds(scores: list[float], count: int, random: Any) -> None:
    ids = random.sample(range(2**32 - 1), len(scores))
    got = ranking.best(torch.tensor(scores), torch.tensor(ids), count)
    rank = {i: (-s if s == s else torch.inf, i) for i, s in zip(ids, scores, strict=True)}
    assert sorted(got.tolist()) == sorted(sorted(ids, key=rank.__getitem__)[:count])


def test_best_of_numbers_that_end_the_range() -> None:
    """The same for NaN and -inf, and for both zeros: there the lower id is better."""
    limit = torch.finfo(torch.float32).max
    ranked = [torch.inf, limit, 2.0, 1.0, 0.0, -0.0, -1.0, -2.0, -limit, torch.nan, -torch.inf]
    ids = [90, 80, 70, 60, 8, 9, 40, 30, 20, 1, 2]
    for count in range(1, len(ids) + 2):
        got = ranking.best(torch.tensor(ranked[::-1]), torch.tensor(ids[::-1]), count)
        assert sorted(got.tolist()) == sorted(ids[:count])


@pytest.mark.fast
def test_best_works_row_by_row() -> None:
    scores, ids = torch.randn(2, 3, 50), torch.randint(1000, (2, 3, 50)) * 50 + torch.arange(50)
    got = ranking.best(scores, ids, 7).sort().values
    want = ids.gather(-1, scores.topk(7).indices).sort().values
    assert torch.equal(got, want)


# Other selectors, and what all of this is for.


@pytest.mark.parametrize("group_shared", [True, False])
@pytest.mark.parametrize(("tokens", "softcap"), [(99, None), (130, None), (130, 1.5)])
def test_the_oracle_takes_the_blocks_with_the_largest_mass(
    tokens: int, softcap: float | None, group_shared: bool
) -> None:
    config = small(method="oracle", group_shared=group_shared)
    q, k, v = make_qkv(tokens, dtype=torch.float64)
    got = selected(config, q, k, v, softcap=softcap)
    for (head, n), blocks in got.items():
        positions, low, high = layout(config, tokens, tokens)[n]
        queries = q[0, 2 * head : 2 * head + 2] if group_shared else q[0, head : head + 1]
        own = k[0, head if group_shared else head // 2]
        rows = [(p, query[p]) for p in positions for query in queries]
        assert blocks == brute.oracle(own, rows, low, high, config.block_k, 4, 0.25, softcap), (
            head,
            n,
        )


def test_streaming_selects_nothing() -> None:
    q, k, v = make_qkv(99)
    assert set(map(tuple, selected(small(method="streaming"), q, k, v).values())) == {()}


@pytest.mark.parametrize("representative", ["blend", "minmax"])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("depth", [100, 1000, 2222, 3500])
def test_a_needle_is_found(depth: int, rows: int, representative: str) -> None:
    config = HiPConfig(
        budget=64, sink=16, window=64, representative=representative, dense_below=0, dense_tail=0
    )
    q, k, v = make_qkv(4096, rows, dim=32, needles={rows - 1: depth})
    got = selected(config, q, k, v)
    last = max(n for _, n in got)
    assert all(depth // config.block_k in got[head, last] for head in range(2))


@pytest.mark.parametrize("representative", ["blend", "minmax"])
@pytest.mark.parametrize("onward", [0.3, 0.0])
def test_a_selection_that_serves_several_steps_reads_on(representative: str, onward: float) -> None:
    """The needle is the last key of block 25; what a copy needs next is in block 26, which nothing
    points to."""
    q, k, v = make_qkv(1000, 1, needles={0: 26 * 16 - 1})
    for refresh in (1, 4):
        fields = dict(
            representative=representative,
            decode_refresh=refresh,
            beam=16,
            rescore=16,
            options={"onward": onward},
        )
        blocks = set(
            selected(small(block_k=16, budget=64, **fields), q, k, v, state=DecodeState())[0, 0]
        )
        assert len(blocks) == 4
        assert 25 in blocks
        assert (26 in blocks) == (onward > 0)


@pytest.mark.parametrize("group_shared", [True, False])
def test_a_group_shares_one_selection_or_each_head_has_its_own(group_shared: bool) -> None:
    """Two heads of one group look for different needles in far apart places."""
    config = small(group_shared=group_shared, budget=8, query_stride=1)
    q, k, v = make_qkv(300, 1, heads=1, dtype=torch.float64)
    k = k / 4
    for head, key in ((0, 100), (1, 200)):
        k[:, :, key] = torch.eye(16, dtype=torch.float64)[head] * 8
        q[:, head] = torch.eye(16, dtype=torch.float64)[head] * 16
    got = selected(config, q, k, v)
    if group_shared:
        assert got == {(0, 0): [25, 50]}
    else:
        assert [{25, 50} & set(got[head, 0]) for head in (0, 1)] == [{25}, {50}]
