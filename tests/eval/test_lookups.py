"""`benchmarks/lookups.py`: estimates of need stand in for the search's own."""

from __future__ import annotations

import sys

import lookups
import pytest
import torch

from hip_hf import HiPConfig, hip_attention
from hip_hf.methods import hip, need

pytestmark = pytest.mark.fast

SMALL = dict(budget=32, block_q=16, block_k=8, sink=8, window=16, dense_tail=0, dense_below=0)
TREE = HiPConfig(**SMALL, beam=1, rescore=2, query_stride=8)
WHOLE = HiPConfig(**SMALL)


def selected(config: HiPConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 400, 16, generator=generator) for heads in (4, 2))
    out, mask = hip_attention(q, k, k, config=config, return_mask=True)
    assert out.isfinite().all()
    return mask.indices


def test_every_module_that_asks_rows_asks_those_of_the_estimate() -> None:
    asked = need.asked_rows
    names = {name for name, module in sys.modules.items() if name.startswith("hip_hf.")}
    using = {name for name in names if getattr(sys.modules[name], "asked_rows", None) is asked}
    using -= {name for name in using if ".triton." in name}
    assert {"hip_hf.methods.hip", "hip_hf.backends.torch.sparse"} <= using
    with lookups.needed_by(lookups.highest, 1):
        selected(TREE)
        assert [name for name in using if sys.modules[name].asked_rows is asked] == []
    assert all(sys.modules[name].asked_rows is asked for name in using)


def test_the_estimate_decides() -> None:
    """By what every key says other rows vote than by nothing, and both differ from the sample's."""
    shipped = selected(TREE)
    with lookups.needed_by(lookups.highest, 1):
        by_all = selected(TREE)
    with lookups.needed_by(lambda q, k: q.new_zeros(q.shape[:2]), 1):
        by_none = selected(TREE)
    assert not torch.equal(by_all, by_none)
    assert not torch.equal(by_all, shipped)
    assert torch.equal(shipped, selected(TREE))


def test_where_nothing_is_estimated_that_is_an_error() -> None:
    assert hip.looked_at_whole(WHOLE, 1, 48)
    with (
        pytest.raises(ValueError, match="nothing was estimated"),
        lookups.needed_by(lookups.highest, 1),
    ):
        selected(WHOLE)
