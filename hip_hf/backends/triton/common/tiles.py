"""What the kernels share that read keys in tiles, of attention and of votes: which keys a query
block reads, and what becomes of their logits.

A query block reads `[sink | selected blocks | window]`. The kernels walk that as one list of
*slots*, so that no key is read twice, no tile but the last is cut, and key blocks of any size fill
tiles of any size. Only slots of selected blocks look up an index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hip_hf.backends.triton.common.rotation import partner, rotate
from hip_hf.backends.triton.common.sequences import token_offsets

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def listed_blocks(slots, ids, sink_length, picked, BLOCK_K: tl.constexpr):
    """Return the key blocks `[N]` that `slots` `[N]` of a query block's list belong to, as far as
    they are selected ones (`key_positions`); `ids` points to the selected blocks."""
    inner = slots - sink_length
    return tl.load(ids + inner // BLOCK_K, mask=(inner >= 0) & (inner < picked), other=0)


@triton.jit
def key_positions(slots, blocks, start, sink_length, picked, window, BLOCK_K: tl.constexpr):
    """Return the positions `[N]` of the keys at `slots` `[N]` of a query block's list: the sink
    `[start, start + sink_length)`, `picked` keys of the selected blocks, then the window from
    `window` on. `blocks` `[N]`: what `listed_blocks` says of the slots."""
    inner = slots - sink_length
    chosen = (inner >= 0) & (inner < picked)
    fixed = tl.where(inner < 0, start + slots, window + inner - picked)
    return tl.where(chosen, blocks * BLOCK_K + inner % BLOCK_K, fixed)


@triton.jit
def tanh(x):
    """Hyperbolic tangent; precise for small arguments too, where `2 / (1 + exp(-2x)) - 1` is
    not."""
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 2 / (1 + tl.exp2(x * (-2 * LOG2E))) - 1)


@triton.jit
def scaled(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Return the logits in base 2 of the products q . k, of any shape."""
    if SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * LOG2E)
    else:
        return products * (scale * LOG2E)


@triton.jit
def key_logits(
    q, k_base, position, inside, seen, place, cos, sin, key_start, batch, stride_kb, stride_kt,
    table, stride_table, scale, softcap, dim, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ROPE_HALF_DIM: tl.constexpr,
):  # fmt: skip
    """Return the logits `[M, N]`, base 2, of the rows q `[M, D]` and the keys at `position` `[N]`:
    -inf where a row has not `seen` `[M, N]` them. ROPE_HALF_DIM > 0: keys are rotated to their
    `place` `[N]`."""
    d = tl.arange(0, D)
    at = token_offsets(
        key_start + position, inside, batch, stride_kb, stride_kt, table, stride_table, PAGE_SIZE
    )
    there = inside[:, None] & (d < dim)[None, :]
    k = tl.load(k_base + at[:, None] + d[None, :], mask=there, other=0.0)
    if ROPE_HALF_DIM > 0:
        other = tl.load(
            k_base + at[:, None] + partner(d, ROPE_HALF_DIM)[None, :], mask=there, other=0.0
        )
        k = rotate(k, other, place, d, cos, sin, ROPE_HALF_DIM).to(k.dtype)
    logits = scaled(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def add_logits(m_i, l_i, logits):
    """Return the greatest logit of each row and its sum of exponentials, `[M]`, base 2, after more
    `logits` `[M, N]`. m_i and l_i are those before."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen nothing yet
    return m_new, l_i * tl.exp2(m_i - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)


@triton.jit
def scaled_with_slope(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Return logits, and their derivative by `products * scale`, of the shape of `products`. They
    are in base e: what is subtracted from them, a stored log-sum-exp, then is not rounded once
    more."""
    if SOFTCAP:
        bent = tanh(products * (scale / softcap))
        return bent * softcap, 1 - bent * bent
    else:
        return products * scale, 1.0


@triton.jit
def selected_keys(
    indices, counts, sequence, head_list, block, lists, blocks, most, BLOCK_K: tl.constexpr,
    SELECTED: tl.constexpr,
):  # fmt: skip
    """Return a pointer to the selected blocks of a query block, in indices int32
    `[S, lists, blocks, most]`, and how many keys they hold by counts int32 `[S, lists, blocks]`."""
    if SELECTED:
        at = (sequence * lists + head_list).to(tl.int64) * blocks + block
        return indices + at * most, tl.load(counts + at) * BLOCK_K
    else:
        return indices, 0
