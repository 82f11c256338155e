"""The best of a program's candidates, in registers, in order of position: a threshold found digit by digit, then compaction.

No sort: the threshold is the `count`-th largest score, found four bits at a time by counting; who is above it is kept, and
of those that equal it the first ones (ties go to the lower position). Candidates come sorted by position and stay so.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Finite scores are at least -FLT_MAX, so no sort key of a real candidate is this.
ABSENT = tl.constexpr(-(2**31))
FLT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def sort_keys(scores, inside):
    """fp32 scores -> int32 that compare alike; NaN is the worst of what is there, `inside` false is `ABSENT`."""
    scores = tl.where(scores != scores, -FLT_MAX, scores)
    scores = tl.minimum(tl.maximum(scores, -FLT_MAX), FLT_MAX)
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 ties with 0
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), ABSENT)


@triton.jit
def threshold(keys, left, right, count):
    """The largest int32 that at least `count` of `keys` `[M]` and the scalars `left` and `right` reach; `ABSENT` if fewer."""
    digits = tl.arange(0, 16)
    found = left * 0
    for step in range(8):
        shift = 28 - 4 * step
        lowest = tl.where(step == 0, -8, 0)  # the first digit carries the sign
        at = found + ((digits + lowest) << shift)
        reach = tl.sum((keys[:, None] >= at[None, :]).to(tl.int32), 0)
        reach += (left >= at).to(tl.int32) + (right >= at).to(tl.int32)
        digit = tl.maximum(tl.sum((reach >= count).to(tl.int32), 0) - 1, 0)
        found += (digit + lowest) << shift
    return found


@triton.jit
def keep_best(ids, keys, left_id, left, right_id, right, count, M: tl.constexpr, KEPT: tl.constexpr):
    """The `count` best of candidates `ids` `[M]` (sorted) with sort keys `keys`, and one more on either side of them.

    Returns ids `[KEPT]`, sorted, and how many of them count; the rest are the last ones' copies or worse: mask them.
    """
    limit = threshold(keys, left, right, count)
    above = keys > limit
    equal = (keys == limit) & (keys != ABSENT)
    spare = count - tl.sum(above.to(tl.int32), 0) - (left > limit).to(tl.int32) - (right > limit).to(tl.int32)
    left_equal = ((left == limit) & (left != ABSENT)).to(tl.int32)
    ties = tl.cumsum(equal.to(tl.int32), 0) + left_equal
    left_kept = ((left > limit) | ((left_equal > 0) & (spare > 0))).to(tl.int32)
    kept = (above | (equal & (ties <= spare))).to(tl.int32)
    ties_before = tl.sum(equal.to(tl.int32), 0) + left_equal
    right_kept = ((right > limit) | ((right == limit) & (right != ABSENT) & (ties_before < spare))).to(tl.int32)
    # Slot j takes the first candidate that has more than j kept ones up to and including it: as many as have at most j.
    upto = tl.cumsum(kept, 0) + left_kept
    total = tl.sum(kept, 0) + left_kept + right_kept
    source = tl.cumsum(tl.histogram(upto, KEPT, mask=upto < KEPT), 0)
    slot = tl.arange(0, KEPT)
    out = tl.gather(ids, tl.minimum(source, M - 1), 0)
    out = tl.where((slot == 0) & (left_kept > 0), left_id, out)
    out = tl.where((slot == total - 1) & (right_kept > 0), right_id, out)
    return out, total
