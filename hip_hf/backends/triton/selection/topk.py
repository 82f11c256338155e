"""The best of a program's candidates, in registers, in order of position: a threshold found digit
by digit, then compaction.

No sort: the threshold is the `count`-th largest score, found four bits at a time by counting; who
is above it is kept, and of those that equal it the first ones (ties go to the lower position).
Candidates come sorted by position and stay so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.tuning import power_of_two

# Finite scores are at least -FLT_MAX, so no sort key of a real candidate is this.
ABSENT = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
FLT_MAX = tl.constexpr(3.4028234663852886e38)
# Tiles are powers of two; below this many candidates they would leave threads idle.
SMALLEST_TILE = 64


def tile(count: int) -> int:
    """Return the size of a tile for `count` candidates: a power of two, at least
    `SMALLEST_TILE`."""
    return max(SMALLEST_TILE, power_of_two(count))


@triton.jit
def sort_keys(scores, inside):
    """Return for fp32 scores `[M]` int32 numbers that compare alike: NaN is the worst of what is
    there, and where `inside` `[M]` is false it is `ABSENT`."""
    scores = tl.where(scores != scores, -FLT_MAX, scores)
    scores = tl.minimum(tl.maximum(scores, -FLT_MAX), FLT_MAX)
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 ties with 0
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), ABSENT)


@triton.jit
def threshold(keys, left, right, count):
    """A number that tells the `count` largest of `keys` `[M]` and of the scalars `left` and `right`
    from the rest: either just those reach it, or it is the `count`-th largest itself; `ABSENT` if
    there are fewer."""
    digits = tl.arange(0, 16)
    # from the smallest int32 on every digit makes it larger, also the one with the sign
    found = left * 0 + ABSENT
    shift = left * 0 + 28
    reached = count - 1
    while (shift >= 0) & (reached != count):
        at = found ^ (digits << shift)
        reach = tl.sum((keys[:, None] >= at[None, :]).to(tl.int32), 0)
        reach += (left >= at).to(tl.int32) + (right >= at).to(tl.int32)
        enough = reach >= count
        digit = tl.maximum(tl.sum(enough.to(tl.int32), 0) - 1, 0)
        reached = tl.min(tl.where(enough, reach, HIGHEST), 0)
        found ^= digit << shift
        shift -= 4
    return found


@triton.jit
def kept_of(keys, left, right, count):
    """Which of `keys` `[M]`, `left` and `right` are the `count` best: 1 or 0 each. Ties go to the
    lower position."""
    limit = threshold(keys, left, right, count)
    above = keys > limit
    equal = (keys == limit) & (keys != ABSENT)
    spare = (
        count
        - tl.sum(above.to(tl.int32), 0)
        - (left > limit).to(tl.int32)
        - (right > limit).to(tl.int32)
    )
    left_equal = ((left == limit) & (left != ABSENT)).to(tl.int32)
    ties = tl.cumsum(equal.to(tl.int32), 0) + left_equal
    left_kept = ((left > limit) | ((left_equal > 0) & (spare > 0))).to(tl.int32)
    kept = (above | (equal & (ties <= spare))).to(tl.int32)
    ties_before = tl.sum(equal.to(tl.int32), 0) + left_equal
    right_kept = (
        (right > limit) | ((right == limit) & (right != ABSENT) & (ties_before < spare))
    ).to(tl.int32)
    return kept, left_kept, right_kept


@triton.jit
def keep_best(
    ids, keys, left_id, left, right_id, right, count, M: tl.constexpr, KEPT: tl.constexpr
):
    """The `count` best of candidates `ids` `[M]` (sorted) with sort keys `keys`, and one more on
    either side of them.

    Returns ids and sort keys `[KEPT]`, by position, and how many of them count; what comes after is
    to be masked.
    """
    kept, left_kept, right_kept = kept_of(keys, left, right, count)
    # Slot j takes the first candidate that has more than j kept ones up to and including it: as
    # many as have at most j.
    upto = tl.cumsum(kept, 0) + left_kept
    total = tl.sum(kept, 0) + left_kept + right_kept
    source = tl.minimum(tl.cumsum(tl.histogram(upto, KEPT, mask=upto < KEPT), 0), M - 1)
    slot = tl.arange(0, KEPT)
    at_left = (slot == 0) & (left_kept > 0)
    at_right = (slot == total - 1) & (right_kept > 0)
    out = tl.where(at_left, left_id, tl.where(at_right, right_id, tl.gather(ids, source, 0)))
    out_keys = tl.where(at_left, left, tl.where(at_right, right, tl.gather(keys, source, 0)))
    return out, tl.where(slot < total, out_keys, ABSENT), total


@triton.jit
def pair(left, right, M: tl.constexpr):
    """`[M / 2]` twice -> `[M]`: first all of `left`, then all of `right`."""
    return tl.reshape(tl.permute(tl.join(left, right), (1, 0)), (M,))


@triton.jit
def merge_long(scratch, first, count, keep, KEPT: tl.constexpr):
    """The `keep` best of the chunks scored in `scratch`, merged tile by tile: ids `[KEPT]`, sorted,
    and how many count."""
    inner = tl.arange(0, KEPT)
    ids = first + inner
    total = first * 0
    none = first * 0 + ABSENT
    for at in range(0, count, KEPT):
        held = inner < total
        kept = sort_keys(tl.load(scratch + ids - first, mask=held, other=0.0), held)
        fresh = at + inner < count
        new = sort_keys(tl.load(scratch + at + inner, mask=fresh, other=0.0), fresh)
        candidates = pair(ids, first + at + inner, 2 * KEPT)
        ids, _, total = keep_best(
            candidates, pair(kept, new, 2 * KEPT), first, none, first, none, keep, 2 * KEPT, KEPT
        )
    return ids, total


@triton.jit
def read_on(scores, ids, total, share, N: tl.constexpr):
    """Scores `[N]` of sorted blocks `ids`, of which `total` count, each with a share of that of the
    block before it, if that is there (`methods/hip.py`)."""
    slot = tl.arange(0, N)
    before = tl.maximum(slot - 1, 0)
    follows = (slot > 0) & (slot < total) & (tl.gather(ids, before, 0) + 1 == ids)
    found = tl.gather(scores, before, 0)
    return scores + tl.where(follows & (found > 0.0), found * share, 0.0)
