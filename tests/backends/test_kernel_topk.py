"""The best of a program's candidates (`backends/triton/selection/topk.py`)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreter import DEVICE

from hip_hf.backends.triton.selection.topk import read_on, threshold
from hip_hf.methods import ranking

pytestmark = [pytest.mark.fast, pytest.mark.kernels]


@triton.jit
def threshold_kernel(keys, sides, out, counts, M: tl.constexpr):
    count = tl.load(counts + tl.program_id(0))
    found = threshold(tl.load(keys + tl.arange(0, M)), tl.load(sides), tl.load(sides + 1), count)
    tl.store(out + tl.program_id(0), found)


@pytest.mark.parametrize("low", [-(2**31), 0, 2**31 - 3])
def test_the_threshold_tells_the_largest_keys_from_the_rest(low: int) -> None:
    """Over all int32, and where keys differ in the last digit or not at all."""
    keys = torch.randint(low, 2**31, (66,), dtype=torch.int64)
    if low < 0:
        keys[:6] = torch.tensor([-(2**31), 2**31 - 1, -1, 0, 2**28, -(2**28)])
    counts = torch.tensor([0, 1, 2, 17, 65, 66, 67], dtype=torch.int32)
    out = torch.zeros_like(counts).to(DEVICE)
    on = keys.int().to(DEVICE)
    threshold_kernel[(len(counts),)](on[:64].clone(), on[64:].clone(), out, counts.to(DEVICE), M=64)
    ordered = keys.sort(descending=True).values
    for count, found in zip(counts.tolist(), out.tolist(), strict=True):
        reached = int((keys >= found).sum())
        assert reached == count or found == (
            ordered[count - 1] if 0 < count <= 66 else 2**31 - 1 if count == 0 else -(2**31)
        )


def test_the_threshold_is_found_by_as_few_digits_as_settle_it() -> None:
    """Lower digits are not looked at: they stay those of the smallest number."""
    keys = torch.arange(1, 67, dtype=torch.int32) << 24
    counts = torch.tensor([1, 40, 66], dtype=torch.int32)
    out = torch.zeros_like(counts).to(DEVICE)
    on = (keys + 12345).to(DEVICE)
    threshold_kernel[(len(counts),)](on[:64].clone(), on[64:].clone(), out, counts.to(DEVICE), M=64)
    assert out.tolist() == [66 << 24, 27 << 24, 0]


@triton.jit
def read_on_kernel(ids, scores, out, total, share: tl.constexpr, N: tl.constexpr):
    slot = tl.arange(0, N)
    tl.store(out + slot, read_on(tl.load(scores + slot), tl.load(ids + slot), total, share, N))


def test_a_block_gets_a_share_of_the_score_of_the_block_before_it() -> None:
    """As the torch backend has it: not across a gap, not from what does not count, nothing of what
    has overflowed."""
    ids = torch.tensor([3, 4, 5, 9, 11, 12, 13, 14], dtype=torch.int32)
    scores = torch.tensor([0.5, 0.25, torch.nan, 0.125, 1.0, -3e38, 2.0, 4.0])
    for total in (8, 6):
        out = torch.full((8,), torch.nan, device=DEVICE)
        read_on_kernel[(1,)](ids.to(DEVICE), scores.to(DEVICE), out, total, 0.5, 8)
        want = scores.nan_to_num(nan=-3e38)
        ranking.read_on(want[:total], ids[:total].long(), 0.5)
        torch.testing.assert_close(out.cpu().nan_to_num(nan=-3e38), want)
    assert want[:2].tolist() == [0.5, 0.5]
    assert want[3:6].tolist() == [0.125, 1.0, pytest.approx(-3e38)]
