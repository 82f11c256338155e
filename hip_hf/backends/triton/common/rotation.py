"""Positions given inside the kernels, for context extension (InfiniteHiP, arXiv 2502.08910):
`rope.py` has the rules.

Queries and keys lie un-rotated in memory and are rotated as they are loaded, by a row of a table
for each place. No place is beyond the trained length but for the rounding to tiles, so the table
does not grow with the context.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hip_hf.rope import Positions


@triton.jit
def partner(d, ROPE_HALF_DIM: tl.constexpr):
    """Return for each number `d` `[D]` of a head the one that it turns with; itself where it does
    not turn."""
    return tl.where(
        d < ROPE_HALF_DIM, d + ROPE_HALF_DIM, tl.where(d < 2 * ROPE_HALF_DIM, d - ROPE_HALF_DIM, d)
    )


@triton.jit
def angles(place, d, cos, sin, ROPE_HALF_DIM: tl.constexpr):
    """Cosine and sine `[N, D]` of the places `[N]` for the numbers `d` `[D]` of a head, the sine
    negative in the first half."""
    turns = (d < 2 * ROPE_HALF_DIM)[None, :]
    at = place[:, None] * ROPE_HALF_DIM + (d % ROPE_HALF_DIM)[None, :]
    c = tl.load(cos + at, mask=turns, other=1.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    return c, tl.where((d < ROPE_HALF_DIM)[None, :], -s, s)


@triton.jit
def rotate(x, other, place, d, cos, sin, ROPE_HALF_DIM: tl.constexpr):
    """Rows `[N, D]` rotated to their places `[N]`, fp32. `d` `[D]`: which numbers of the head they
    are; `other`: what is at `partner(d)`."""
    c, s = angles(place, d, cos, sin, ROPE_HALF_DIM)
    return x.to(tl.float32) * c + other.to(tl.float32) * s


@triton.jit
def unrotate(x, other, place, d, cos, sin, spread, ROPE_HALF_DIM: tl.constexpr):
    """Rows `[N, D]` rotated back by their places `[N]`, fp32. Where `spread` is true they are half
    widths of boxes, and the result is those of the boxes around the rotated ones. `other` and `d`
    are as in `rotate`."""
    c, s = angles(place, d, cos, sin, ROPE_HALF_DIM)
    c, s = tl.where(spread, tl.abs(c), c), tl.where(spread, tl.abs(s), -s)
    return x.to(tl.float32) * c + other.to(tl.float32) * s


@triton.jit
def queries_with_rope(pointers, inside, place, d, cos, sin, scaling, ROPE_HALF_DIM: tl.constexpr):
    """Queries `[N, D]` at the int64 addresses `pointers` `[N]`, rotated to their places and scaled
    for both sides of the product, fp32. Rows outside `inside` are 0, and their places must be in
    the table as well."""
    x = tl.load(pointers[:, None] + d[None, :], mask=inside, other=0.0)
    other = tl.load(pointers[:, None] + partner(d, ROPE_HALF_DIM)[None, :], mask=inside, other=0.0)
    return (
        rotate(x, other, place, d, cos, sin, ROPE_HALF_DIM)
        * tl.where(d < 2 * ROPE_HALF_DIM, scaling, 1.0)[None, :]
    )


def rotation(positions: Positions | None, beyond: int, stand_in: torch.Tensor) -> dict[str, Any]:
    """Arguments of a kernel that places what it reads, up to `beyond` places after the trained
    ones: the tables are fp32 `[places, ROPE_HALF_DIM]`. Without `positions` ROPE_HALF_DIM is 0 and
    `stand_in`, any tensor on the device, takes the place of the tables."""
    if positions is None:
        return dict(COS=stand_in, SIN=stand_in, trained=0, scaling=1.0, ROPE_HALF_DIM=0)
    rope = positions.rope
    cos, sin = rope.tables(positions.trained + beyond, torch.float32, stand_in.device)
    places = dict(trained=positions.trained, scaling=rope.scaling**2, ROPE_HALF_DIM=rope.dim // 2)
    return dict(COS=cos, SIN=sin, **places)
