"""The kernel that finds outliers (`outliers.py`) against the pyramid's, and these against the definition."""

from __future__ import annotations

import brute
import pytest
import torch
from helpers import small
from test_kernel_select import Case, whole

from hip_hf.kernels.outliers import outliers_of
from hip_hf.methods.pyramid import farthest, outlier_position
from hip_hf.problem import Span

pytestmark = pytest.mark.kernels

SAMPLE = 8


def found(case: Case, block_q: int = 16) -> torch.Tensor:
    _, _, kv, sequences = case.arguments()
    return outliers_of(kv, sequences, case.config, block_q, case.k.shape[-1]).cpu()


def check(case: Case) -> None:
    """Of every complete chunk before the last query block's window, at every level that a sample can be of."""
    got = found(case)
    levels = 0
    for s, span in enumerate(case.spans):
        pyramid, high = case.pyramid(span), case.blocks(span, False)[-1].high
        for level, want in enumerate(pyramid.outliers):
            if level and 2 * (case.arguments()[3].max_keys // case.config.block_k >> level - 1) <= SAMPLE:
                break
            rows = got[s, :, (1 << level) - 1 :: 2 << level][:, : high >> level]
            assert rows.shape[1] == high >> level > 0
            assert torch.equal(outlier_position(rows), outlier_position(want[:, : high >> level])), (s, level)
            levels = max(levels, level)
    assert levels > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [0, 32])
@pytest.mark.parametrize(("block_k", "dim"), [(4, 16), (6, 24), (1, 80)])
def test_the_farthest_key_of_every_chunk(block_k: int, dim: int, page_size: int, dtype: torch.dtype, poison: None) -> None:
    """Sequences of several lengths, one of which begins in the middle of a page."""
    config = small(block_k=block_k, budget=2 * block_k, query_stride=8, options={"sample": SAMPLE})
    spans = [Span(0, 0, 261, 0, 37, 224), Span(1, 11, 261, 5, 37, 218)]
    check(Case(config, spans, page_size=page_size, dim=dim, heads=2, dtype=dtype))


def test_of_equally_far_keys_the_first_and_nan_before_all(poison: None) -> None:
    case = Case(small(query_stride=8, options={"sample": SAMPLE}), [whole(131, 40)])
    case.k = torch.zeros_like(case.k)
    case.k[0, 0, 41] = torch.nan
    got = outlier_position(found(case)[0, 0])
    firsts = got[0::2][:24].tolist()
    assert firsts == [4 * i if i != 10 else firsts[10] for i in range(24)]
    assert firsts[10] in range(40, 44)
    assert got[(1 << 3) - 1 :: 2 << 3][:3].tolist() == [0, firsts[10], 64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outliers_by_definition(dtype: torch.dtype) -> None:
    keys = torch.randn(2, 60, 8, dtype=torch.float64).to(dtype)
    keys[:, 7] = keys[:, 4]
    got = outlier_position(farthest(keys[:, 12:].unflatten(1, (-1, 4)), 3))
    for head in range(2):
        assert got[head].tolist() == [brute.outlier(keys[head], range(4 * i, 4 * i + 4), 4) for i in range(3, 15)]


def test_a_short_middle_is_its_own_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched for it."""
    case = Case(small(query_stride=8), [whole(131, 40)])
    monkeypatch.setattr("hip_hf.kernels.outliers.outlier_arguments", lambda *args: pytest.fail("launched"))
    assert found(case).shape[0] == 1
