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
from torch.autograd.function import once_differentiable

from hip_hf.backends.triton import trust
from hip_hf.backends.triton.attention.gradients import key_gradient_kernel, query_gradient_kernel
from hip_hf.backends.triton.attention.inversion import Inverted, invert
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.addressing import KeyValues
from hip_hf.backends.triton.common.arguments import Logits, Reads
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.common.tuning import (
    Tile,
    power_of_two,
    precision_of,
    target_of,
    tile_of,
)
from hip_hf.problem import by_tokens

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# The widest head whose dK and dV are summed in one pass: both sums stay in registers.
WIDEST_TOGETHER = 128


@dataclass(frozen=True)
class Part:
    """Some of a call's rows, and what they read: the rows of prompts that select, or the dense ones
    at their ends."""

    sequences: Sequences
    reads: Reads


def _three(prefix: str, x: torch.Tensor) -> dict[str, int]:
    return dict(zip((f"stride_{prefix}{axis}" for axis in "bht"), x.stride(), strict=False))


def _shared_arguments(
    q: torch.Tensor,
    kv: KeyValues,
    part: Part,
    logits: Logits,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    tile: Tile,
) -> dict[str, Any]:
    heads, dim, dim_v, reads = q.shape[1], q.shape[-1], kv.v.shape[-1], part.reads
    lists = kv.heads if reads.indices is None else reads.indices.shape[1]
    group = heads // lists
    padded = power_of_two(group)
    rows = max(1, 16 // padded, min(tile.rows // padded, power_of_two(reads.block_q)))
    wide, wide_v = (max(16, power_of_two(x)) for x in (dim, dim_v))
    return dict(
        Q=q, K=kv.k, V=kv.v, LSE=lse, GRAD_OUT=grad_out, SEQUENCES=part.sequences.table,
        **_three("q", q), **_three("k", kv.k), **_three("v", kv.v), **_three("g", grad_out), **_three("l", lse),
        stride_sequences=part.sequences.table.stride(0),
        lists=lists, sink_keys=reads.sink, window_keys=reads.window, dim=dim, dim_v=dim_v,
        scale=logits.scale, softcap=logits.softcap or 1.0, sliding=logits.sliding_window or 0,
        BLOCK_Q=reads.block_q, BLOCK_K=reads.block_k, BLOCK_M=rows, BLOCK_N=tile.keys,
        GROUP=group, GROUP_PADDED=padded, LISTS_PER_HEAD=lists // kv.heads, D=wide, DV=wide_v,
        SELECTED=reads.indices is not None, SOFTCAP=logits.softcap is not None, SLIDING=logits.sliding_window is not None,
        PRECISION=precision_of(q), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def query_gradient_arguments(
    q: torch.Tensor, kv: KeyValues, part: Part, logits: Logits, out: torch.Tensor, lse: torch.Tensor,
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, grad_q: torch.Tensor, mean: torch.Tensor, tile: Tile,
) -> tuple[tuple[int, int, int], dict[str, Any]]:  # fmt: skip
    """Grid and arguments of `query_gradient_kernel`."""
    reads, sequences = part.reads, part.sequences
    arguments = _shared_arguments(q, kv, part, logits, lse, grad_out, tile) | dict(
        OUT=out, GRAD_LSE=lse if grad_lse is None else grad_lse, GRAD_Q=grad_q, MEAN=mean,
        INDICES=sequences.table if reads.indices is None else reads.indices,
        COUNTS=sequences.table if reads.counts is None else reads.counts,
        **_three("o", out), **_three("dq", grad_q),
        blocks=0 if reads.indices is None else reads.indices.shape[2],
        most=0 if reads.indices is None else reads.indices.shape[3],
        HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip
    arguments["EVEN_HEADDIM"] = arguments["D"] == q.shape[-1] and arguments["DV"] == kv.v.shape[-1]
    tiles = sequences.blocks(reads.block_q) * -(-reads.block_q // arguments["BLOCK_M"])
    return (tiles, arguments["lists"], sequences.count), arguments


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


def inverted(part: Part, tile: Tile) -> Inverted | None:
    """A part's lists by tile of keys, where it has any."""
    reads, tiles = part.reads, KeyTiles.of(part.reads.block_k, tile)
    if reads.indices is None or reads.counts is None:
        return None
    return invert(reads.indices, reads.counts, tiles.blocks, tiles.lists(part))


def key_gradient_arguments(
    q: torch.Tensor, kv: KeyValues, part: Part, logits: Logits, lse: torch.Tensor,
    grad_out: torch.Tensor, mean: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, lists: Inverted | None, tile: Tile,
) -> tuple[tuple[int, int, int], list[dict[str, Any]]]:  # fmt: skip
    """Grid and arguments of `key_gradient_kernel`'s launches, one for dK and dV or one each;
    `lists` are those of `inverted`."""
    arguments = _shared_arguments(q, kv, part, logits, lse, grad_out, tile)
    reads, sequences = part.reads, part.sequences
    tiles = KeyTiles.of(reads.block_k, tile)
    nothing = sequences.table  # stands for what is not read
    lists = lists or Inverted(nothing, nothing, nothing)
    arguments |= dict(
        MEAN=mean, GRAD_K=grad_k, GRAD_V=grad_v, WHO=lists.who, WHAT=lists.what, OFFSETS=lists.offsets,
        **_three("dk", grad_k), **_three("dv", grad_v),
        BLOCK_N=max(16, power_of_two(tiles.keys)), TILE=tiles.keys, PARTS=tiles.parts,
    )  # fmt: skip
    once = max(arguments["D"], arguments["DV"]) <= WIDEST_TOGETHER
    passes = (
        [dict(OF_K=True, OF_V=True)]
        if once
        else [dict(OF_K=True, OF_V=False), dict(OF_K=False, OF_V=True)]
    )
    return (tiles.lists(part) * tiles.parts, kv.heads, sequences.count), [
        arguments | each for each in passes
    ]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: Logits,
    parts: tuple[Part, ...],
    config: HiPConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prefill` that autograd knows: q `[B, Hq, Tq, D]`, k, v -> out `[B, Hq, Tq, Dv]` and lse fp32
    `[B, Hq, Tq]`.

    `parts` must not share rows; rows in none of them give 0 and -inf. q, k, v and `logits.sinks`
    get gradients, also those of lse. The last dimension of q, k and v must have stride 1. `config`:
    the settings of the call, for what Triton may refuse of its backward pass.
    """
    return _Attention.apply(q, k, v, logits.sinks, logits, parts, config)


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: Logits,
    parts: tuple[Part, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    need_sinks: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of q, k, v and, if asked for, of the sinks, from what `attention` gave and the
    gradients of that (None: zero)."""
    kv = KeyValues(k, v)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v, mean = (torch.zeros_like(x) for x in (q, k, v, lse))
    shape = (target_of(q), q.shape[-1], v.shape[-1], q.dtype)
    by_query, by_key = tile_of("backward queries", *shape), tile_of("backward keys", *shape)
    for part in parts:
        grid, arguments = query_gradient_arguments(
            q, kv, part, logits, out, lse, grad_out, grad_lse, grad_q, mean, by_query
        )
        query_gradient_kernel[grid](**arguments)
        lists = inverted(part, by_key)
        grid, passes = key_gradient_arguments(
            q, kv, part, logits, lse, grad_out, mean, grad_k, grad_v, lists, by_key
        )
        for arguments in passes:
            key_gradient_kernel[grid](**arguments)
    grad_sinks = None
    if need_sinks:  # each sink has a weight, and a value of zero
        assert logits.sinks is not None
        weights = torch.exp(logits.sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        grad_sinks = -(weights * mean).sum((0, 2)).to(logits.sinks.dtype)
    return grad_q, grad_k, grad_v, grad_sinks


Gradient = torch.Tensor | None  # None: it is zero, or not asked for


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        logits: Logits,
        parts: tuple[Part, ...],
        config: HiPConfig,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = by_tokens(q, v.shape[-1]).zero_()
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        for part in parts:
            prefill(q, KeyValues(k, v), part.sequences, part.reads, logits, out, lse)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.set_materialize_grads(False)
        ctx.logits, ctx.parts, ctx.config = (
            (logits.scale, logits.softcap, logits.sliding_window),
            parts,
            config,
        )
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Gradient, grad_lse: Gradient) -> tuple[Gradient, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        need, (scale, softcap, sliding_window) = ctx.needs_input_grad, ctx.logits
        logits = Logits(scale, softcap, sliding_window, sinks)
        with trust.noting_refusals(q.device, ctx.config):
            grads = gradients(q, k, v, logits, ctx.parts, out, lse, grad_out, grad_lse, need[3])
        return *(x if need[i] else None for i, x in enumerate(grads)), None, None, None
