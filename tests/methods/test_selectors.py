"""What is particular to each selector: staged is the tree where it should be, bounds bound,
patterns find what was planted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import assert_near, make_problem, make_qkv, read_mask, small
from hypothesis import given, settings
from hypothesis import strategies as st
from staged_by_hand import Written

from hip_hf.attention import attend
from hip_hf.config import HiPConfig
from hip_hf.geometry import BlockMask, QueryBlock
from hip_hf.methods import hip, quest, sample, staged
from hip_hf.state import DecodeState

pytestmark = pytest.mark.fast


def mask_of(
    tensors: tuple[torch.Tensor, ...], config: HiPConfig, starts: list[int] | None = None
) -> BlockMask:
    result = attend(make_problem(*tensors, starts), config, need_mask=True)
    assert result.mask is not None
    return result.mask


def as_set(mask: BlockMask, head: int, block: int) -> set[int]:
    return set(mask.indices[0, head, block, : mask.counts[0, head, block]].tolist())


# staged


@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize(("tokens", "rows"), [(600, 40), (601, 97), (333, 20), (600, 1), (600, 5)])
def test_staged_with_one_halving_a_stage_is_the_tree(
    score: str, shared: bool, beam: int, tokens: int, rows: int
) -> None:
    tensors = make_qkv(tokens, rows)
    common = dict(
        representative="middle", score=score, vote="sampled", group_shared=shared, decode_refresh=1
    )
    tree = small(beam=beam, query_stride=2, **common)
    # where the tree begins: some query blocks of the call may begin a level lower, by their count
    top = max(hip.start_level(tree, 1, (p - 16) // 4) for p in range(tokens - rows, tokens))
    # a stage keeps as many *chunks* as the tree's beam does
    stages = [[4 << level, 4 * beam * (4 << level), 2] for level in range(top, 0, -1)] + [
        [4, 16, 2]
    ]
    config = small(method="staged", options=dict(stages=stages, halvings=0), **common)
    got, want = mask_of(tensors, config), mask_of(tensors, tree)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.counts, want.counts)


STAGES = [[[64, 128, 3], [16, 64, 2], [4, 16, 1]], [[32, 64, 2], [4, 16, 2]], [[4, 16, 2]]]


@pytest.mark.parametrize("score", ["mass", "max"])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("rows", [50, 3])
def test_staged_by_brute_force(score: str, stages: list[list[int]], rows: int) -> None:
    q, k, v = make_qkv(400, rows, heads=1, groups=2, dtype=torch.float64)
    config = small(
        method="staged",
        score=score,
        options=dict(stages=[[c, n, 1] for c, n, _ in stages]),
        query_stride=1,
    )
    mask = mask_of((q, k, v), config)
    for i, first in enumerate(mask.first[0].tolist()):
        size = 1 if rows == 3 else 16 - first % 16
        votes = q[0, :, first - (400 - rows) : first - (400 - rows) + size].flatten(0, 1)
        search = Written(k[0, 0], votes, score, 16**-0.5)
        assert sorted(as_set(mask, 0, i)) == search.run(stages, 1, max(0, first - 16) // 4, 4), (
            f"query block {i}"
        )


@pytest.mark.parametrize("refresh", [[8, 4, 2], [4, 4, 1], [6, 2, 2]])
def test_every_stage_has_its_interval(refresh: list[int], monkeypatch: Any) -> None:
    """Which stages run at each step; and the step reads what they keep, wherever the window has
    been left."""
    q, k, v = make_qkv(400, dtype=torch.float64)
    stages = [[64, 128, 1], [16, 64, 1], [4, 16, 1]]
    config = small(method="staged", options=dict(stages=stages), decode_refresh=refresh)
    ran: list[int] = []
    real = staged.StagedSearch._score

    def counted(
        self: Any, heads: slice, blocks: list[QueryBlock], stage: staged.Stage, *rest: Any
    ) -> torch.Tensor:
        ran.append([s[0] for s in stages].index(stage.chunk))
        return real(self, heads, blocks, stage, *rest)

    monkeypatch.setattr(staged.StagedSearch, "_score", counted)
    state = DecodeState()
    first_ids = None
    for step in range(12):
        at = 360 + step
        ran.clear()
        got = attend(
            make_problem(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1]),
            config,
            None,
            state,
            need_mask=True,
        )
        age = step % refresh[0]
        due = [i for i, steps in enumerate(refresh) if age % steps == 0]
        assert ran == (list(range(due[0], 3)) if due else [])
        kept = state.rows[0].selection
        assert kept is not None
        assert kept.position == at - age
        read = read_mask(
            got.mask, config, q[:, :, at : at + 1], k[:, :, : at + 1], window=kept.window_start
        )
        logits = (
            q[:, :, at : at + 1] @ k[:, :, : at + 1].repeat_interleave(2, 1).transpose(2, 3) / 4
        ).masked_fill(~read, -torch.inf)
        assert_near(got.out, logits.softmax(-1) @ v[:, :, : at + 1].repeat_interleave(2, 1), 1e-10)
        ids = state.rows[0].selection.stages[0][0]
        if age == 0:
            first_ids = ids
        assert ids is first_ids  # the first stage's choice is the one made when it was due


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(options=dict(stages=[])), "list of"),
        (dict(options=dict(stages=[[64, 64]])), "list of"),
        (dict(options=dict(stages=[[48, 48, 1], [4, 16, 1]])), "powers of two"),
        (dict(options=dict(stages=[[16, 32, 1], [16, 16, 1]])), "descending"),
        (dict(options=dict(stages=[[16, 40, 1], [4, 16, 1]])), "multiples"),
        (dict(options=dict(stages=[[16, 16, 1], [4, 32, 1]])), "descending"),
        (dict(options=dict(stages=[[16, 64, 1]])), "at last"),
        (dict(options=dict(halvings=-1)), "halvings"),
        (dict(decode_refresh=[4, 2]), "one per stage"),
        (dict(decode_refresh=[4, 3, 1]), "divides"),
        (dict(decode_refresh=[]), "decode_refresh"),
        (dict(method="hip", decode_refresh=[4, 2]), "no stages"),
    ],
)
def test_bad_stages(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**{"method": "staged", **fields})


# quest


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 3, 4, 16]),
    st.sampled_from([2, 5, 16]),
    st.floats(0.01, 30),
)
def test_quests_score_bounds_every_key_of_the_block(
    seed: int, block_k: int, dim: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 7 * block_k + 1, dim, generator=generator, dtype=torch.float64) * size
    q = torch.randn(2, 5, dim, generator=generator, dtype=torch.float64)
    selector = quest.Selector(HiPConfig(method="quest", block_k=block_k, budget=block_k))
    pyramid = selector.make_pyramid(torch.float64)
    pyramid.extend(keys, 7)
    bound = selector.representative.features(q) @ pyramid.levels[0][:, :7].transpose(
        1, 2
    )  # [2, 5, 7]
    true = (q @ keys[:, : 7 * block_k].transpose(1, 2)).unflatten(-1, (7, block_k))
    assert (bound[..., None] >= true - 1e-9 * size).all()
    blocks = keys[:, : 7 * block_k].unflatten(1, (7, block_k))
    most, least = (corner[:, None] for corner in (blocks.amax(2), blocks.amin(2)))
    corners = torch.maximum(q[..., None, :] * most, q[..., None, :] * least)
    assert_near(bound, corners.sum(-1), 1e-9 * size)  # and no bound over the box is tighter


@pytest.mark.parametrize("rows", [60, 1])
def test_quest_takes_the_best_bounds(rows: int) -> None:
    q, k, v = make_qkv(300, rows, heads=1, groups=1, dtype=torch.float64)
    config = small(method="quest", score="max", query_stride=1)
    mask = mask_of((q, k, v), config)
    for i, first in enumerate(mask.first[0].tolist()):
        size, high = (1 if rows == 1 else 16 - first % 16), (first - 16) // 4
        votes = q[0, 0, first - (300 - rows) : first - (300 - rows) + size]
        blocks = k[0, 0, : high * 4].unflatten(0, (-1, 4))
        bound = (
            torch.maximum(votes[:, None] * blocks.amax(1), votes[:, None] * blocks.amin(1))
            .sum(-1)
            .amax(0)
        )
        best = sorted(range(1, high), key=lambda b: -float(bound[b]))[:4]
        assert as_set(mask, 0, i) == set(best)


# vertical-slash, sample


def with_pattern(columns: list[int], distances: list[int]) -> tuple[torch.Tensor, ...]:
    """Queries and keys whose attention stands on some columns and diagonals."""
    tokens, dim = 256, 320
    k = torch.zeros(1, 1, tokens, dim)
    q = torch.zeros(1, 1, tokens, dim)
    k[..., torch.arange(tokens), torch.arange(tokens)] = 1  # each key its own direction
    for i in range(tokens):
        q[..., i, columns] = 1
        q[..., i, [i - d for d in distances if i >= d]] = 1
    return 200 * q, k, torch.randn(1, 1, tokens, 8)


def test_vertical_slash_finds_planted_columns_and_diagonals() -> None:
    """Of a budget of 8 blocks, half are for columns. The diagonals cross five blocks of four keys
    in a query block of 16."""
    tensors = with_pattern([42, 90], [83])
    config = small(method="vertical_slash", budget=32, options=dict(rows=32))
    mask = mask_of(tensors, config)
    for i, first in enumerate(mask.first[0].tolist()):
        if first < 144:
            continue  # there are few candidates
        chosen = as_set(mask, 0, i)
        assert {42 // 4, 90 // 4} <= chosen
        crossed = {(first + row - 83) // 4 for row in range(16)}
        assert len(crossed & chosen) >= 4, (first, chosen, crossed)
    no_slash = mask_of(
        tensors, small(method="vertical_slash", budget=32, options=dict(rows=32, vertical=1.0))
    )
    crossed = {(240 + row - 83) // 4 for row in range(16)}
    assert len(crossed & as_set(no_slash, 0, 15)) < 4


def test_vertical_slash_scores_by_brute_force() -> None:
    from hip_hf.methods import vertical_slash

    q, k, _ = make_qkv(120, 60, heads=2, groups=2, dtype=torch.float64)
    config = small(method="vertical_slash", options=dict(rows=20), group_shared=False)
    bound = vertical_slash.Selector(config).bind(q.unflatten(1, (2, 2))[0], k[0], None, 0.25, None)
    logits = 0.25 * q[0] @ k[0].repeat_interleave(2, 0).transpose(1, 2)
    seen = torch.arange(120) <= torch.arange(60, 120)[:, None]
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1)[:, -20:]
    assert_near(bound.scores.flatten(0, 1), p.sum(1).unflatten(-1, (-1, 4)).sum(-1), 1e-5)
    diagonals = torch.zeros(4, 120, dtype=torch.float64)
    for row in range(20):
        for key in range(100 + row + 1):
            diagonals[:, 100 + row - key] += p[:, row, key]
    block = QueryBlock(36, 96, 111, 0, 4, 1, 20, 80)
    want = torch.zeros(4, 19, dtype=torch.float64)
    for b in range(1, 20):
        for row in range(96, 112):
            for key in range(4 * b, 4 * b + 4):
                want[:, b - 1] += diagonals[:, row - key]
    assert_near(bound.slash(slice(0, 2), block).flatten(0, 1), want, 1e-9)


@pytest.mark.parametrize(
    ("share", "rows", "want"), [(1.0, 5, [0, 1, 2, 3, 4]), (0.3, 10, [0, 3, 6, 9]), (0.05, 3, [2])]
)
def test_sampled_rows(share: float, rows: int, want: list[int]) -> None:
    selector = sample.Selector(small(method="sample", options=dict(rows=share)))
    assert selector.looked_at(rows).tolist() == want


def test_sample_takes_the_columns_with_the_most_mass() -> None:
    q, k, v = make_qkv(200, heads=1, groups=2, dtype=torch.float64)
    mask = mask_of((q, k, v), small(method="sample", options=dict(rows=0.25)))
    seen = torch.arange(200) <= torch.arange(200)[:, None]
    p = (q[0] @ k[0].transpose(1, 2) / 4).masked_fill(~seen, -torch.inf).softmax(-1)
    columns = p[:, 3::4].sum((0, 1)).unflatten(0, (-1, 4)).sum(-1)
    for i, first in enumerate(mask.first[0].tolist()):
        high = max(0, first - 16) // 4
        best = sorted(range(1, high), key=lambda b: -float(columns[b]))[:4]
        assert as_set(mask, 0, i) == set(best)


# h2o


def evictions(
    q: torch.Tensor, k: torch.Tensor, rows_of: list[list[int]], budget: int
) -> list[set[int]]:
    """Blocks kept at each query block (given by its rows): q `[G, T, D]`, k `[T, D]`; sink 4,
    window 16, blocks of 4."""
    kept: set[int] = set()
    joined, results = 1, []
    mass = [0.0] * (len(k) // 4 + 1)
    for rows in rows_of:
        high = max(0, rows[0] - 16) // 4
        kept |= set(range(joined, high))
        joined = max(joined, high)
        kept = set(sorted(kept, key=lambda b: (-mass[b], b))[:budget])
        results.append(set(kept))
        for row in rows[::-1][::2]:  # every second votes, the last one does
            read = [j for j in range(row + 1) if j < 4 or j >= high * 4 or j // 4 in kept]
            for g in range(len(q)):
                p = (k[read] @ q[g, row] / 4).softmax(0)
                for j, share in zip(read, p.tolist(), strict=True):
                    mass[j // 4] += share
    return results


def test_h2o_by_brute_force() -> None:
    q, k, v = make_qkv(203, heads=1, groups=2, dtype=torch.float64)
    config = small(method="h2o", decode_refresh=1)
    want = evictions(
        q[0],
        k[0, 0],
        [list(range(at, min(at + 16, 180))) for at in range(0, 180, 16)] + [[180], [181]],
        4,
    )
    state = DecodeState()
    mask = attend(
        make_problem(q[:, :, :180], k[:, :, :180], v[:, :, :180]),
        config,
        None,
        state,
        need_mask=True,
    ).mask
    assert [as_set(mask, 0, i) for i in range(12)] == want[:12]
    for n in (180, 181):
        step = (q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1])
        mask = attend(make_problem(*step), config, None, state, need_mask=True).mask
        assert as_set(mask, 0, 0) == want[n - 180 + 12]
    for before, after in pairwise(want):
        assert all(
            b in before or b >= max(before, default=0) for b in after
        )  # what is gone is gone


def test_h2o_beams_grow_apart() -> None:
    q, k, v = make_qkv(140, batch=2, dtype=torch.float64)
    k[1], v[1], q[1, :, :120] = k[0], v[0], q[0, :, :120]
    config, state, alone = small(method="h2o", decode_refresh=1), DecodeState(), DecodeState()
    first = make_problem(q[:1, :, :120], k[:1, :, :120], v[:1, :, :120])
    attend(first, config, None, state)
    attend(first, config, None, alone)
    state.reorder([0, 0])
    for at in range(120, 140):
        step = (q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1])
        both = attend(make_problem(*step), config, None, state).out
        assert_near(
            both[:1], attend(make_problem(*(x[:1] for x in step)), config, None, alone).out, 1e-12
        )


def test_h2o_after_a_crop_looks_at_everything_once() -> None:
    q, k, v = make_qkv(200, dtype=torch.float64)
    config, state = small(method="h2o", decode_refresh=1), DecodeState()
    attend(make_problem(q, k, v), config, None, state)
    state.crop(100)
    step = (q[:, :, 100:101], k[:, :, :101], v[:, :, :101])
    got = attend(make_problem(*step), config, None, state, need_mask=True)
    fresh = attend(make_problem(*step), config, None, None, need_mask=True)
    assert torch.equal(got.mask.indices, fresh.mask.indices)
    assert_near(got.out, fresh.out, 1e-12)
