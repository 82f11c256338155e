"""The selection kernel in half precision, at the default settings above all: the blocks that a
search in float64 takes."""

from __future__ import annotations

from typing import Any

import brute
import pytest
import torch
from helpers import small
from selection_cases import Case, whole

from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, Span

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def defaults(**fields: Any) -> HiPConfig:
    """The default settings with a quarter of the budget and fewer candidates: a search of 3,000
    keys starts two levels up."""
    return HiPConfig(**{**dict(budget=256, beam=2, rescore=3, dense_below=0), **fields})


@both_dtypes
def test_default_settings(dtype: torch.dtype) -> None:
    Case(defaults(), [whole(3300, 70)], dtype=dtype, dim=64, groups=4).check()


@pytest.mark.parametrize("rows", [1, 37])
def test_the_whole_budget(rows: int) -> None:
    """Nothing smaller than a user would have: 512 candidates at a level, 64 blocks of 1,000 at the
    end."""
    shape = dict(dtype=torch.bfloat16, dim=128, groups=4)
    case = Case(HiPConfig(dense_below=0), [whole(17000, rows)], **shape)
    case.check(per_row=rows == 1, keep=rows == 1)


@both_dtypes
def test_default_settings_in_decode_over_pages(dtype: torch.dtype) -> None:
    spans = [whole(2900, 1), whole(2611, 1, 1, 5)]
    case = Case(defaults(), spans, page_size=48, dtype=dtype, dim=64, groups=4)
    case.check(per_row=True, keep=True)


@both_dtypes
@pytest.mark.parametrize("dim", [96, 128, 192, 256])
def test_head_dims(dtype: torch.dtype, dim: int) -> None:
    Case(small(rescore=2), [whole(251, 9)], dtype=dtype, dim=dim).check()


@pytest.mark.parametrize(("dtype", "fields"), [
    (torch.bfloat16, dict(representative="middle", group_shared=False, rescore=8)),
    (torch.float16, dict(representative="minmax", score="max")),
    (torch.bfloat16, dict(query_stride=1, rescore=2)),
    (torch.float16, dict(vote="sampled", rescore=3)),
    (torch.bfloat16, dict(coarsest=16, rescore=4)),
])  # fmt: skip
def test_other_settings_over_pages(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    spans = [whole(271, 13, 0, 3), Span(1, 3, 200, 0, 5, 192)]
    Case(small(**fields), spans, page_size=7, dtype=dtype, softcap=30.0).check()


@both_dtypes
def test_the_comparison_would_see_coarser_numbers(dtype: torch.dtype) -> None:
    """Summaries of five bits lead to other blocks, where no exact look comes after them."""
    case = Case(defaults(rescore=1), [whole(3300, 200)], dtype=dtype, dim=64, groups=4)
    exact, pyramid = case.expected(False), case.pyramid

    def coarser(span: Span) -> Any:
        found = pyramid(span)
        for level in found.levels:
            fraction, exponent = level.float().frexp()
            level.copy_(((fraction * 32).round() / 32).ldexp(exponent))
        return found

    case.pyramid = coarser  # type: ignore[method-assign]
    assert case.expected(False) != exact


@both_dtypes
def test_half_precision_selects_what_scores_as_high(dtype: torch.dtype) -> None:
    """Flat search, so that scores are comparable: what was kept weighs as much as the best in
    float64, but for rounding."""
    config = small(vote="sampled", options={"weight": 0}, coarsest=4, rescore=1, budget=64)
    case = Case(config, [whole(701, 5)], dtype=dtype, needles={2: 300, 4: 500})
    got = case.run(config.block_q)
    plain = Case.__new__(Case)
    plain.__dict__ |= case.__dict__ | dict(q=case.q.double(), k=case.k.double())
    for (s, head, n), blocks in plain.expected(False).items():
        chosen = got.indices[s, head, n, : got.counts[s, head, n]].tolist()
        block = case.blocks(case.spans[s], False)[n]
        scores = flat_scores(plain, head, block)
        lost = sum(scores[i] for i in blocks) - sum(scores[i] for i in chosen)
        halves = flat_scores(case, head, block)
        rounding = max(abs(halves[i] - scores[i]) for i in scores)
        assert lost <= 2 * rounding * len(blocks), (
            f"head {head}, query block {n}: lost {lost} of {sum(scores[i] for i in blocks)}"
        )
        assert len(set(chosen)) == len(blocks)


def flat_scores(case: Case, head: int, block: QueryBlock) -> dict[int, float]:
    """Largest weight of every candidate by its mean key, computed in the tensors' own dtype."""
    levels = case.pyramid(case.spans[0]).levels
    means = levels[0][head, block.low : block.high, : case.q.shape[-1]].to(case.q.dtype)
    group = case.q[0, head * case.groups : (head + 1) * case.groups]
    rows = group[:, block.row : block.row + block.rows].transpose(0, 1)
    votes = torch.stack([row for row, _ in brute.sampled(rows, case.config.query_stride)])
    shares = torch.softmax(votes @ means.T * case.scale, dim=-1).amax(0)
    return dict(zip(range(block.low, block.high), shares.tolist(), strict=True))
