"""The pyramid of chunk summaries: every row is what its keys say, however the keys arrived."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hip_hf.config import REPRESENTATIVES
from hip_hf.methods import pyramid
from hip_hf.methods.pyramid import Pyramid, make_representative

pytestmark = pytest.mark.fast

WEIGHT = 0.25


def build(
    name: str, keys: torch.Tensor, blocks: int, block_k: int = 4, dtype: torch.dtype | None = None
) -> Pyramid:
    made = Pyramid(make_representative(name, WEIGHT), block_k, dtype or keys.dtype)
    made.extend(keys, blocks)
    return made


def written(made: Pyramid) -> list[torch.Tensor]:
    """The rows of every level that has complete chunks."""
    return [made.levels[level][:, : made.count(level)] for level in range(made.blocks.bit_length())]


def assert_same(got: Pyramid, want: Pyramid) -> None:
    assert got.blocks == want.blocks
    for level, (a, b) in enumerate(zip(written(got), written(want), strict=True)):
        assert torch.equal(a, b), (
            f"level {level}: rows {(a != b).any(-1).nonzero().tolist()} differ"
        )


def direct_row(name: str, chunk: torch.Tensor) -> torch.Tensor:
    """The row of a chunk `[keys, D]` by the formulas, from its keys."""
    mean, low, high = chunk.mean(0), chunk.amin(0), chunk.amax(0)
    if name in ("blend", "minmax"):
        w = WEIGHT if name == "blend" else 1.0
        return torch.cat([(1 - w) * mean + w * (high + low) / 2, w * (high - low) / 2])
    return chunk[len(chunk) // 2]


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("block_k", [4, 5])
def test_every_row_of_every_level_from_its_keys(name: str, block_k: int) -> None:
    keys = torch.randn(2, 123, 8, dtype=torch.float64)
    blocks = keys.shape[1] // block_k
    made = build(name, keys, blocks, block_k)
    for level, rows in enumerate(written(made)):
        size = block_k << level
        assert rows.shape[1] == keys.shape[1] // size
        for head in range(2):
            for i, row in enumerate(rows[head]):
                want = direct_row(name, keys[head, i * size : (i + 1) * size])
                torch.testing.assert_close(
                    row, want, rtol=0, atol=1e-12, msg=lambda m, at=(level, i): f"chunk {at}: {m}"
                )


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_summaries_of_short_floats_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    keys = (torch.randn(2, 300, 8) + 3).to(dtype)
    got = build(name, keys, 75, dtype=torch.float32)
    exact = build(name, keys.double(), 75)
    for a, b in zip(written(got), written(exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REPRESENTATIVES)
@given(pieces=st.lists(st.integers(0, 60), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_appending_in_pieces_is_building_at_once(name: str, pieces: list[int]) -> None:
    torch.manual_seed(0)  # of every example
    keys = torch.randn(2, 4 * sum(pieces) + 3, 8)
    grown, blocks = build(name, keys, 0), 0
    for piece in pieces:
        blocks += piece
        grown.extend(keys[:, : 4 * blocks + 3], blocks)  # no key beyond is there yet
    assert_same(grown, build(name, keys, blocks))


@pytest.mark.parametrize("name", REPRESENTATIVES)
@given(steps=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_truncating_and_appending_other_keys_is_building_at_once(
    name: str, steps: list[tuple[int, int]]
) -> None:
    """As crop and decode do: go back to some length, continue with new keys."""
    torch.manual_seed(0)  # of every example
    keys = torch.randn(2, 4 * 40, 8)
    grown = build(name, keys, 40)
    for back, forth in steps:
        kept = min(back, grown.blocks)
        grown.truncate(kept)
        assert grown.blocks == kept
        keys = torch.cat([keys[:, : 4 * kept], torch.randn(2, 4 * forth, 8)], dim=1)
        grown.extend(keys, kept + forth)
        assert_same(grown, build(name, keys, kept + forth))


def test_truncating_beyond_the_end_changes_nothing() -> None:
    keys = torch.randn(1, 80, 8)
    made = build("blend", keys, 20)
    made.truncate(25)
    assert_same(made, build("blend", keys, 20))
    made.extend(keys, 10)
    assert_same(made, build("blend", keys, 20))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_copy_grows_alone(name: str) -> None:
    keys = torch.randn(1, 400, 8)
    others = torch.cat([keys[:, :212], torch.randn(1, 188, 8)], dim=1)
    made = build(name, keys, 40)
    made.extend(keys, 53)  # now its tables have room, which both would write to if they shared them
    copy = made.copy()
    copy.extend(others, 100)
    assert_same(made, build(name, keys, 53))
    made.extend(keys, 100)
    assert_same(copy, build(name, others, 100))
    assert_same(made, build(name, keys, 100))


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_the_size_of_a_batch_of_blocks_does_not_matter(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = torch.randn(2, 500, 8)
    want = build(name, keys, 125)
    monkeypatch.setattr(pyramid, "BLOCKS_AT_ONCE", at_once)
    assert_same(build(name, keys, 125), want)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_every_row_is_written(name: str) -> None:
    keys = torch.randn(2, 500, 8)
    grown = build(name, keys, 0)
    for blocks in (1, 3, 64, 65, 125):
        grown.extend(keys, blocks)
    assert all(rows.isfinite().all() for rows in written(grown))


# Scores.


def logits(made: Pyramid, q: torch.Tensor, level: int) -> torch.Tensor:
    """What queries `[rows, D]` make of each chunk of a level of a pyramid of one head,
    `[rows, chunks]`."""
    rep = made.representative
    return rep.features(q) @ written(made)[level][0].T


# Few distinct values, so that equal ones, zeros and signs meet often; sizes that a sum keeps apart.
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(-100, 100, width=16)


@given(st.lists(VALUES, min_size=3 * 24, max_size=3 * 24), st.lists(VALUES, min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_minmax_bounds_every_key_of_its_chunk(numbers: list[float], query: list[float]) -> None:
    keys, q = (
        torch.tensor(numbers, dtype=torch.float64).view(1, 24, 3),
        torch.tensor([query], dtype=torch.float64),
    )
    made = build("minmax", keys, 6)
    for level in range(3):
        bound = logits(made, q, level)[0]
        for i, limit in enumerate(bound):
            inside = keys[0, i * (4 << level) : (i + 1) * (4 << level)]
            assert (inside @ q[0] <= limit + 1e-9).all(), f"level {level}, chunk {i}"
            box = torch.maximum(q[0] * inside.amin(0), q[0] * inside.amax(0)).sum()
            assert abs(float(limit - box)) <= 1e-9, (
                "the bound is that of the keys' box, and no looser"
            )


def test_blend_lies_between_mean_and_bound() -> None:
    keys, q = torch.randn(1, 256, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for level in range(6):
        bound, blend = (logits(build(name, keys, 64), q, level) for name in ("minmax", "blend"))
        mean = q @ keys[0].unflatten(0, (-1, 4 << level)).mean(1).T
        torch.testing.assert_close(blend, (1 - WEIGHT) * mean + WEIGHT * bound)
        assert (mean <= bound + 1e-12).all()
