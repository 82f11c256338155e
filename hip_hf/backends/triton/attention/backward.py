"""Backward pass of block-sparse attention: dQ, dK, dV without atomics, so that gradients repeat bit
by bit. Reference: `backends/torch/backward.py`.

dQ walks what each query block reads, as the forward pass does. dK and dV need the other direction:
which query blocks read a tile of keys. For sink and window that is a range of rows; for selected
blocks the lists are inverted on the device (`invert`), without waiting for it. Gradients flow
through the keys that were read, not through the selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hip_hf.backends.triton import trust
from hip_hf.backends.triton.attention.gradients import key_gradient_kernel, query_gradient_kernel
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import (
    GridAndArguments,
    Logits,
    Operands,
    Part,
    row_arguments,
    shared_arguments,
)
from hip_hf.backends.triton.common.sequences import KeyValues
from hip_hf.backends.triton.common.tuning import Tile, power_of_two
from hip_hf.problem import by_tokens

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# The widest head whose dK and dV are summed in one pass: both sums stay in registers.
WIDEST_TOGETHER = 128

Gradient = Tensor | None  # None: it is zero, or not asked for


def _strides(prefix: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"stride_{prefix}{axis}" for axis in "bht"), x.stride(), strict=False))


def query_gradient_arguments(
    x: Operands, part: Part, grad_out: Tensor, grad_lse: Gradient, grad_q: Tensor, mean: Tensor,
    tile: Tile,
) -> GridAndArguments:  # fmt: skip
    """Grid and arguments of `query_gradient_kernel`. `x` has the forward pass's out and lse;
    grad_out is `[B, Hq, Tq, Dv]`, grad_q `[B, Hq, Tq, D]`, grad_lse and mean are fp32
    `[B, Hq, Tq]`."""
    assert x.lse is not None
    tiles, arguments = row_arguments(x, part, tile)
    arguments |= dict(
        OUT=x.out, LSE=x.lse, GRAD_OUT=grad_out, GRAD_LSE=x.lse if grad_lse is None else grad_lse,
        GRAD_Q=grad_q, MEAN=mean, HAS_GRAD_LSE=grad_lse is not None,
        **_strides("o", x.out), **_strides("l", x.lse), **_strides("g", grad_out),
        **_strides("dq", grad_q),
    )  # fmt: skip
    return (tiles, arguments["lists"], part.sequences.count), arguments


@dataclass(frozen=True)
class KeyTiles:
    """Tiles of keys: `blocks` key blocks each, at most 31, or, where a block has more keys than a
    tile, `1 / parts` of one."""

    blocks: int
    parts: int
    keys: int

    @staticmethod
    def of(block_k: int, tile: Tile) -> KeyTiles:
        """For key blocks of `block_k` keys; no tile has more than `tile.keys`, for its sums stay in
        registers."""
        blocks, parts = min(31, max(1, tile.keys // block_k)), -(-block_k // tile.keys)
        return KeyTiles(blocks, parts, blocks * block_k if parts == 1 else -(-block_k // parts))

    def lists(self, part: Part) -> int:
        """Lists that cover every sequence: one for each tile, or for all parts of a block."""
        return -(-part.sequences.max_keys // (self.blocks * part.reads.block_k))


@dataclass(frozen=True)
class Inverted:
    """Which query blocks selected something of each tile of keys.

    Entries `offsets[i]` to `offsets[i + 1] - 1` (int64 `[S * H' * tiles + 1]`) belong to tile
    `i % tiles` of list `i // tiles`; `who` int32: the query block, ascending; `what` int32: bit `j`
    is set where it selected the tile's `j`-th key block.
    """

    who: Tensor
    what: Tensor
    offsets: Tensor


def invert(indices: Tensor, counts: Tensor, per_tile: int, tiles: int) -> Inverted:
    """Invert lists of key blocks, indices `[S, H', Nq, n]` and counts `[S, H', Nq]`, into lists per
    tile of `per_tile` <= 31 key blocks. All on the device, always in the same order."""
    sequences, lists, blocks, most = indices.shape
    device = indices.device
    listed = torch.arange(most, device=device) < counts[..., None]
    tile = torch.where(listed, indices // per_tile, -1)
    bit = torch.where(listed, 1 << (indices % per_tile), 0).int()
    # a list is sorted, so what it has of one tile stands together: its first entry gathers the bits
    # of the others
    what = bit.clone()
    for j in range(1, min(per_tile, most)):
        what[..., :-j] += torch.where(tile[..., j:] == tile[..., :-j], bit[..., j:], 0)
    leads = listed.clone()
    leads[..., 1:] &= tile[..., 1:] != tile[..., :-1]
    owner = torch.arange(sequences * lists, device=device).view(sequences, lists, 1, 1) * tiles
    owner = torch.where(leads, owner + tile, sequences * lists * tiles).flatten()
    owner, order = owner.sort(stable=True)
    offsets = torch.searchsorted(owner, torch.arange(sequences * lists * tiles + 1, device=device))
    who = (order // most % blocks).int()
    return Inverted(who, what.flatten()[order], offsets)


def inverted(part: Part, tile: Tile) -> Inverted | None:
    """A part's lists by tile of keys, where it has any."""
    reads, tiles = part.reads, KeyTiles.of(part.reads.block_k, tile)
    if reads.indices is None or reads.counts is None:
        return None
    return invert(reads.indices, reads.counts, tiles.blocks, tiles.lists(part))


def key_gradient_arguments(
    x: Operands, part: Part, grad_out: Tensor, mean: Tensor, grad_k: Tensor, grad_v: Tensor,
    lists: Inverted | None, tile: Tile,
) -> tuple[tuple[int, int, int], list[dict[str, Any]]]:  # fmt: skip
    """Grid and arguments of `key_gradient_kernel`'s launches, one for dK and dV or one each.
    `lists` are those of `inverted`; grad_k is `[B, Hkv, T, D]`, grad_v `[B, Hkv, T, Dv]`, and the
    other tensors are as in `query_gradient_arguments`."""
    assert x.lse is not None
    arguments, tiles = shared_arguments(x, part, tile), KeyTiles.of(part.reads.block_k, tile)
    nothing = part.sequences.table  # stands for what is not read
    lists = lists or Inverted(nothing, nothing, nothing)
    arguments |= dict(
        LSE=x.lse, GRAD_OUT=grad_out, MEAN=mean, GRAD_K=grad_k, GRAD_V=grad_v,
        WHO=lists.who, WHAT=lists.what, OFFSETS=lists.offsets,
        **_strides("l", x.lse), **_strides("g", grad_out), **_strides("dk", grad_k),
        **_strides("dv", grad_v),
        BLOCK_N=max(16, power_of_two(tiles.keys)), TILE=tiles.keys, PARTS=tiles.parts,
    )  # fmt: skip
    passes = [dict(OF_K=True, OF_V=False), dict(OF_K=False, OF_V=True)]
    if max(arguments["D"], arguments["DV"]) <= WIDEST_TOGETHER:
        passes = [dict(OF_K=True, OF_V=True)]
    grid = (tiles.lists(part) * tiles.parts, x.kv.heads, part.sequences.count)
    return grid, [arguments | each for each in passes]


def attend_with_gradients(
    x: Operands, parts: tuple[Part, ...], config: HiPConfig
) -> tuple[Tensor, Tensor]:
    """`prefill` that autograd knows, into a new out `[B, Hq, Tq, Dv]` and lse fp32 `[B, Hq, Tq]`.

    `parts` must not share rows; rows in none of them give 0 and -inf. Queries, keys, values and
    sinks get gradients, also those of lse. `config`: the settings of the call, for what Triton may
    refuse of its backward pass.
    """
    return _Attention.apply(x.q, x.kv.k, x.kv.v, x.logits.sinks, x.logits, parts, config)


def gradients(
    x: Operands, parts: tuple[Part, ...], grad_out: Gradient, grad_lse: Gradient
) -> tuple[Tensor, Tensor, Tensor, Gradient]:
    """Gradients of q, k, v and, if there are any, of the sinks `[Hq]`, each of the shape of what it
    belongs to, from what the attention gave (in `x`) and the gradients of that: grad_out
    `[B, Hq, Tq, Dv]` and grad_lse fp32 `[B, Hq, Tq]`."""
    assert x.lse is not None
    grad_out = torch.zeros_like(x.out) if grad_out is None else grad_out
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    given, sinks = (x.q, x.kv.k, x.kv.v, x.lse), x.logits.sinks
    grad_q, grad_k, grad_v, mean = map(torch.zeros_like, given)
    by_query, by_key = x.tile("backward queries"), x.tile("backward keys")
    for part in parts:
        grid, arguments = query_gradient_arguments(
            x, part, grad_out, grad_lse, grad_q, mean, by_query
        )
        query_gradient_kernel[grid](**arguments)
        lists = inverted(part, by_key)
        grid, passes = key_gradient_arguments(
            x, part, grad_out, mean, grad_k, grad_v, lists, by_key
        )
        for arguments in passes:
            key_gradient_kernel[grid](**arguments)
    if sinks is None:
        return grad_q, grad_k, grad_v, None
    # each sink has a weight, and a value of zero
    weights = torch.exp(sinks.float()[:, None] - x.lse).masked_fill(x.lse == -torch.inf, 0.0)
    return grad_q, grad_k, grad_v, -(weights * mean).sum((0, 2)).to(sinks.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, logits: Logits, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """`rest`: parts and settings."""
        out = by_tokens(q, v.shape[-1]).zero_()
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        ctx.logits = logits.scale, logits.softcap, logits.sliding_window
        ctx.parts, ctx.config = rest
        for part in ctx.parts:
            prefill(Operands(q, KeyValues(k, v), logits, out, lse), part)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Gradient, grad_lse: Gradient) -> tuple[Gradient, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        need, (scale, softcap, sliding_window) = ctx.needs_input_grad, ctx.logits
        logits = Logits(scale, softcap, sliding_window, sinks if need[3] else None)
        with trust.noting_refusals(q.device, ctx.config):
            x = Operands(q, KeyValues(k, v), logits, out, lse)
            grads = gradients(x, ctx.parts, grad_out, grad_lse)
        return *(x if need[i] else None for i, x in enumerate(grads)), None, None, None
