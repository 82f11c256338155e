"""The kernels as PyTorch operators, so that `torch.compile(fullgraph=True)` sees one node for the
search and one for attention.

Sequences come as a table on the device (`Sequences.table`), so nothing is read back while a graph
runs. A decode step writes to what it is given of the state that is kept: a CUDA graph can hold it,
and does the same for each step. Eager calls launch by the same functions of `sparse.py`. Only the
dense tail of an eager prompt differs: the host knows where its rows are, and splits their keys over
the device (`dense.dense_rows`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from hip_hf.backends.sdpa import grouped_sdpa
from hip_hf.backends.triton import sparse, trust
from hip_hf.backends.triton.attention.backward import Gradient, Part, gradients
from hip_hf.backends.triton.common.addressing import KeyValues
from hip_hf.backends.triton.common.arguments import Logits, Reads, dense_reads
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.dispatch import run
from hip_hf.backends.triton.pyramid.pyramid import KeyPyramid
from hip_hf.backends.triton.selection.search import SelectionBuffers
from hip_hf.backends.triton.sparse import DeviceState
from hip_hf.config import HiPConfig
from hip_hf.geometry import DECODE_ROWS, mask_heads
from hip_hf.problem import AttentionProblem, by_tokens, make_spans

Pair = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=64)
def settings(text: str) -> HiPConfig:
    return HiPConfig.from_dict(json.loads(text))


def make_table(
    q: torch.Tensor,
    k: torch.Tensor,
    key_start: torch.Tensor | None,
    q_start: torch.Tensor | None,
    tail: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables int32 `[5, B]` of all rows of each sequence, and of its last `tail` rows. Tensor
    operations only."""
    (batch, _, rows, _), keys = q.shape, k.shape[2]
    zero = torch.zeros(batch, dtype=torch.int32, device=q.device)
    first = zero if key_start is None else key_start.to(q.device, torch.int32)
    at = zero + (keys - rows) if q_start is None else q_start.to(q.device, torch.int32)
    row = (first - at).clamp(0, rows)
    position = (at + row - first).clamp(min=0)
    index = torch.arange(batch, dtype=torch.int32, device=q.device)
    skipped = (rows - row - tail).clamp(min=0)
    whole = torch.stack([index, first, row, rows - row, position])
    return whole, torch.stack(
        [index, first, row + skipped, rows - row - skipped, position + skipped]
    )


@contextmanager
def launching(q: torch.Tensor, config: HiPConfig) -> Iterator[None]:
    """On the device of q; a graph that is made already cannot go dense where Triton refuses a
    launch."""
    with torch.cuda.device_of(q), trust.noting_refusals(q.device, config):
        yield


@torch.library.custom_op("hip_hf::select", mutates_args=())
def select(
    q: torch.Tensor,
    k: torch.Tensor,
    sinks: torch.Tensor | None,
    table: torch.Tensor,
    config: str,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    block_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key blocks of every query block, as `SelectionBuffers` has them: indices `[B, H, N, budget /
    block_k]` and counts `[B, H, N]`, int32."""
    fields, logits = settings(config), Logits(scale, softcap, sliding_window, sinks)
    sequences = Sequences(table, q.shape[2], k.shape[2])
    with launching(q, fields):
        selection = sparse.select_blocks(q, KeyValues(k, k), sequences, fields, logits, block_q)
    return selection.indices, selection.counts


@select.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    sinks: torch.Tensor | None,
    table: torch.Tensor,
    config: str,
    *rest: Any,
) -> Pair:
    fields = settings(config)
    heads = mask_heads(fields, q.shape[1], k.shape[1])
    shape = (q.shape[0], heads, Sequences(table, q.shape[2], k.shape[2]).blocks(rest[-1]))
    budget = fields.budget_blocks
    return q.new_empty(*shape, budget, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


def _parts(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, tail: torch.Tensor | None, indices: torch.Tensor | None,
    counts: torch.Tensor | None, config: str, block_q: int,
) -> tuple[Part, ...]:  # fmt: skip
    """What an attention operator was told, as `backward.attention` takes it. `block_q` 0:
    everything is dense."""
    if block_q == 0:
        return (Part(Sequences(table, q.shape[2], k.shape[2]), dense_reads()),)
    fields = settings(config)
    reads = Reads(block_q, fields.block_k, fields.sink, fields.window, indices, counts)
    if tail is None:
        return (Part(Sequences(table, q.shape[2], k.shape[2]), reads),)
    head = table.clone()
    head[3] -= tail[3]
    return (
        Part(Sequences(head, q.shape[2], k.shape[2]), reads),
        Part(Sequences(tail, min(q.shape[2], fields.dense_tail), k.shape[2]), dense_reads()),
    )


@torch.library.custom_op("hip_hf::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    table: torch.Tensor,
    tail: torch.Tensor | None,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    config: str,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    block_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to sink, window and the blocks of `indices`; the rows of `tail` read everything.
    Out `[B, Hq, Tq, Dv]` and lse fp32 `[B, Hq, Tq]`; rows outside every sequence give 0 and
    -inf."""
    out = by_tokens(q, v.shape[3]).zero_()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    kv, logits = KeyValues(k, v), Logits(scale, softcap, sliding_window, sinks)
    parts = _parts(q, k, table, tail, indices, counts, config, block_q)
    fields = settings(config)
    keys = k.shape[2] if block_q == 0 else fields.sparse_reach
    with launching(q, fields):
        sparse.attend_parts(q, kv, logits, parts, keys, out, lse)
    return out, lse


@attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Pair:
    return by_tokens(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hip_hf::attend_backward", mutates_args=())
def attend_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: torch.Tensor,
    tail: torch.Tensor | None,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    config: str,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    block_q: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and, where there are any, of the sinks (else an empty tensor)."""
    parts = _parts(q, k, table, tail, indices, counts, config, block_q)
    logits = Logits(scale, softcap, sliding_window, sinks)
    with launching(q, settings(config)):
        grads = gradients(q, k, v, logits, parts, out, lse, grad_out, grad_lse, sinks is not None)
    return *grads[:3], q.new_empty(0) if grads[3] is None else grads[3]


@attend_backward.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    of_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *map(torch.empty_like, (q, k, v)), of_sinks


@torch.library.custom_op(
    "hip_hf::decode_step",
    mutates_args=("summaries", "states", "built", "indices", "counts", "window", "made"),
)
def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    table: torch.Tensor,
    summaries: torch.Tensor,
    states: torch.Tensor,
    built: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    window: torch.Tensor,
    made: torch.Tensor,
    config: str,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """`sparse.decode_step` on the tensors of a `DeviceState`: `[B, 1, Hq, Dv]`, as layers of models
    want it; 0 where a sequence has no row."""
    fields = settings(config)
    out = q.new_zeros(q.shape[0], 1, q.shape[1], v.shape[3])
    scratch = sparse.step_scratch(fields, q, k.shape[1], v.shape[3])
    state = DeviceState(
        KeyPyramid(fields, summaries, states, built),
        SelectionBuffers(indices, counts, window, made),
        scratch,
    )
    sequences, logits = (
        Sequences(table, 1, k.shape[2]),
        Logits(scale, softcap, sliding_window, sinks),
    )
    with launching(q, fields):
        sparse.decode_step(
            q, KeyValues(k, v), sequences, fields, logits, state, out.transpose(1, 2)
        )
    return out


@decode_step.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, sinks, table, tail, indices, counts, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, table, tail, indices, counts)


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Gradient, ...]:
    q, k, v, sinks, out, lse, table, tail, indices, counts = ctx.saved_tensors
    grads = attend_backward(
        grad_out, grad_lse, q, k, v, sinks, out, lse, table, tail, indices, counts, *ctx.rest
    )
    return (*grads[:3], None if sinks is None else grads[3], *[None] * (4 + len(ctx.rest)))


attend.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("hip_hf::prompt", mutates_args=())
def prompt(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    key_start: torch.Tensor | None,
    q_start: torch.Tensor | None,
    config: str,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """HyperAttention or Delta correction of a prompt: out `[B, Hq, Tq, Dv]` and lse fp32
    `[B, Hq, Tq]`. Leaves and anchors depend on its length, so `key_start` and `q_start`, where
    given, are read by the host: it waits for them."""
    out = by_tokens(q, v.shape[3]).zero_()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    problem = AttentionProblem(
        q, k, v, make_spans(q, k, key_start, q_start), scale, sliding_window, softcap, sinks
    )
    fields = settings(config)
    if problem.spans:
        with launching(q, fields):
            run(problem, fields, None, out, lse, False)
    return out, lse


@prompt.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Pair:
    return by_tokens(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: HiPConfig,
    dense: bool,
    scale: float,
    key_start: torch.Tensor | None,
    q_start: torch.Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`hip_attention` without a state, for a graph that is being compiled: out, and lse if asked
    for."""
    decoding, text = q.shape[2] <= DECODE_ROWS, config.text
    table, tail = make_table(q, k, key_start, q_start, config.dense_tail)
    plain = (
        key_start is None
        and q_start is None
        and sliding_window is None
        and softcap is None
        and sinks is None
    )
    if dense and plain and not need_lse and q.shape[2] in (1, k.shape[2]):
        return grouped_sdpa(q, k, v, scale, q.shape[2] > 1), None
    if not dense and (config.method == "hyper" or config.delta is not None):
        out, lse = prompt(q, k, v, sinks, key_start, q_start, text, scale, softcap, sliding_window)
        return out, lse if need_lse else None
    block_q = 0 if dense else 1 if decoding else config.block_q
    indices = counts = None
    if not dense and config.method == "hip":
        detached = (None if x is None else x.detach() for x in (q, k, sinks))
        indices, counts = select(*detached, table, text, scale, softcap, sliding_window, block_q)
    tails = None if dense or decoding or not config.dense_tail else tail
    out, lse = attend(
        q, k, v, sinks, table, tails, indices, counts, text, scale, softcap, sliding_window, block_q
    )
    return out, lse if need_lse else None
