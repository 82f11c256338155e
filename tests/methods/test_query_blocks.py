"""The geometry of query blocks by itself: which rows share one, and where sink, candidates and
window lie."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import small

from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span, make_query_block, query_blocks
from hip_hf.methods.need import most_sampled, sample_level, sampled_chunks, votes_of
from hip_hf.methods.ranking import sampled_rows, squash

pytestmark = pytest.mark.fast

SIZES: list[dict[str, Any]] = [
    dict(block_k=1, budget=2, sink=0, window=0),
    dict(block_k=1, budget=2, sink=3, window=5, block_q=7),
    dict(block_k=4, budget=16, sink=4, window=16),
    dict(block_k=4, budget=16, sink=5, window=18, block_q=5),
    dict(block_k=3, budget=6, sink=40, window=2),
]


def tight(multiple: int, size: int, at: int) -> bool:
    """Whether it is the last multiple of `size` that is not above `at`."""
    return multiple % size == 0 and multiple <= at < multiple + size


def check(
    block: QueryBlock, sizes: dict[str, Any], window: int | None, sliding: int | None
) -> None:
    bk, first = sizes["block_k"], block.first
    assert tight(block.start, bk, 0 if sliding is None else max(0, first - sliding + 1)), (
        "the first key in sight of its first row"
    )
    if window is None:
        own = max(0, first - sizes["window"])
        assert (
            tight(block.window_start, bk, own)
            if own >= block.start
            else block.window_start == block.start
        )
    else:
        assert block.window_start == max(window, block.start)
    rounded = next(at for at in range(0, 999, bk) if at >= sizes["sink"])
    assert block.start <= block.window_start
    assert block.sink_end == sorted((block.start, rounded, block.window_start))[1], (
        "the sink, as far as it is in sight and not in the window"
    )
    assert (block.low * bk, block.high * bk, block.num_candidates) == (
        block.sink_end,
        block.window_start,
        block.high - block.low,
    )


@pytest.mark.parametrize("sliding", [None, 1, 9, 30])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("per_row", [True, False])
def test_query_blocks_by_the_written_rules(
    per_row: bool, sizes: dict[str, Any], sliding: int | None
) -> None:
    config = small(**sizes)
    size = 1 if per_row else config.block_q
    for position, rows, row_start in itertools.product((0, 1, 16, 33), (1, 16, 37), (0, 5)):
        span = Span(0, 2, 2 + position + rows, row_start, row_start + rows, position)
        blocks = query_blocks(config, span, per_row, sliding)
        at = [(block.row + i, block.first + i) for block in blocks for i in range(block.rows)]
        assert at == [(row_start + i, position + i) for i in range(rows)], (
            "each row is in one block, in order"
        )
        groups = [block.first // size for block in blocks]
        assert all(block.last // size == group for block, group in zip(blocks, groups, strict=True))
        assert groups == sorted(set(groups)), "rows of one aligned group are in one block"
        for block in blocks:
            check(block, sizes, None, sliding)


@pytest.mark.parametrize("sliding", [None, 9])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("window", [0, 12, 36])
def test_a_window_that_is_kept(window: int, sizes: dict[str, Any], sliding: int | None) -> None:
    block = make_query_block(small(**sizes), 2, 40, 40, window, sliding)
    check(block, sizes, window, sliding)
    assert (block.row, block.first, block.last, block.rows) == (2, 40, 40, 1)


def test_logits_are_squashed_in_place() -> None:
    logits = torch.tensor([-100.0, -1.0, 0.0, 2.0])
    want = 3 * torch.tanh(logits / 3)
    squash(logits, None)
    assert logits.tolist() == [-100.0, -1.0, 0.0, 2.0]
    squash(logits, 3.0)
    torch.testing.assert_close(logits, want)


# Who votes in a block.


@pytest.mark.parametrize("stride", [1, 2, 5, 16, 40])
def test_rows_that_vote_by_their_place(stride: int) -> None:
    config = small(query_stride=stride, vote="sampled")
    for rows in (1, 4, 15, 16):
        block = make_query_block(config, 7, 32, 31 + rows, None, None)
        want = [7 + i for i in range(rows) if (rows - 1 - i) % stride == 0]
        assert list(sampled_rows(block, config.query_stride)) == want


def test_how_many_rows_vote() -> None:
    config = small(block_q=16, query_stride=8)
    assert [votes_of(config, rows, 3, False) for rows in (1, 2, 16)] == [3, 3, 6]
    assert [votes_of(config, rows, 3, True) for rows in (1, 2, 6, 16)] == [3, 3, 9, 24]
    assert votes_of(small(block_q=16, query_stride=5), 16, 1, False) == 4
    assert votes_of(small(block_q=16, query_stride=40), 16, 1, False) == 1
    assert votes_of(small(block_q=16, query_stride=16), 16, 2, False) == 2


def test_need_is_estimated_from_one_key_in_64_within_limits() -> None:
    config = HiPConfig()
    lengths = (4096, 12288, 24576, 49152, 1 << 20)
    assert [most_sampled(config, 4, 4 + n // 16) for n in lengths] == [192, 192, 384, 768, 768]
    every = HiPConfig(options={"sample": 1 << 28})
    assert most_sampled(every, 4, 4 + (1 << 16)) > 1 << 20
    assert most_sampled(HiPConfig(options={"sample": 2}), 0, 1) == 2


@pytest.mark.parametrize("block_k", [1, 3, 4])
def test_the_sample_of_the_candidates_is_as_fine_as_allowed(block_k: int) -> None:
    config = small(block_k=block_k, budget=2 * block_k)
    for low, high, most in itertools.product((0, 1, 5), (6, 40, 41), (2, 7, 64)):
        inside = range(low * block_k, high * block_k)

        def chunks(level: int, inside: range = inside) -> list[int]:
            """The chunks of `2 ** level` keys that lie wholly among the candidates."""
            every = range((inside.stop >> level) + 1)
            return [
                i for i in every if inside.start <= i << level and (i + 1) << level <= inside.stop
            ]

        level = sample_level(config, low, high, most)
        assert len(chunks(level)) <= most
        assert level == 0 or len(chunks(level - 1)) > most
        first, end = sampled_chunks(config, low, high, level)
        assert list(range(first, end)) == chunks(level)
