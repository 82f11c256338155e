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
from torch import Tensor

from hip_hf.backends.base import kind_of
from hip_hf.backends.sdpa import grouped_sdpa
from hip_hf.backends.triton import sparse, trust
from hip_hf.backends.triton.attention.backward import Gradient, gradients
from hip_hf.backends.triton.common.arguments import Logits, Operands, Part, Reads, dense_reads
from hip_hf.backends.triton.common.sequences import KeyValues, Sequences
from hip_hf.backends.triton.dispatch import run_by_kernels
from hip_hf.backends.triton.pyramid import KeyPyramid
from hip_hf.backends.triton.selection.search import SelectionBuffers
from hip_hf.backends.triton.sparse import DeviceState
from hip_hf.config import HiPConfig
from hip_hf.geometry import DECODE_ROWS, mask_heads
from hip_hf.problem import AttentionProblem, by_tokens, make_spans

Pair = tuple[Tensor, Tensor]

# What several operators take, as PyTorch writes it. A `block_q` of 0: everything is dense.
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? sinks"
_LISTS = "Tensor table, Tensor? tail, Tensor? indices, Tensor? counts"
_SETTINGS = "str config, float scale, float? softcap, SymInt? sliding_window"
_STATE = ("summaries", "states", "built", "indices", "counts", "window", "made")
_WRITTEN = ", ".join(f"Tensor(a{i}!) {name}" for i, name in enumerate(_STATE))


@lru_cache(maxsize=64)
def settings(text: str) -> HiPConfig:
    """The settings that `HiPConfig.text` gave an operator."""
    return HiPConfig.from_dict(json.loads(text))


def make_table(
    q: Tensor, k: Tensor, key_start: Tensor | None, q_start: Tensor | None, tail: int
) -> Pair:
    """Tables int32 `[5, B]` of all rows of each sequence, and of its last `tail` rows."""
    (batch, _, rows, _), keys = q.shape, k.shape[2]
    zero = torch.zeros(batch, dtype=torch.int32, device=q.device)
    first = zero if key_start is None else key_start.to(q.device, torch.int32)
    at = zero + (keys - rows) if q_start is None else q_start.to(q.device, torch.int32)
    row = (first - at).clamp(0, rows)
    position = (at + row - first).clamp(min=0)
    index = torch.arange(batch, dtype=torch.int32, device=q.device)
    skipped = (rows - row - tail).clamp(min=0)
    whole = [index, first, row, rows - row, position]
    last = [index, first, row + skipped, rows - row - skipped, position + skipped]
    return torch.stack(whole), torch.stack(last)


@contextmanager
def launching(q: Tensor, config: HiPConfig) -> Iterator[None]:
    """On the device of q; a graph that is made already cannot go dense if Triton refuses."""
    with torch.cuda.device_of(q), trust.noting_refusals(q.device, config):
        yield


def _outputs(q: Tensor, v: Tensor) -> Pair:
    """Output and log-sum-exp of rows that read nothing."""
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    return by_tokens(q, v.shape[3]).zero_(), lse


def _fake_outputs(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Pair:
    return by_tokens(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "hip_hf::select",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor? sinks, Tensor table, {_SETTINGS}, SymInt block_q)"
    " -> (Tensor, Tensor)",
)
def select(q: Tensor, k: Tensor, sinks: Tensor | None, table: Tensor, *rest: Any) -> Pair:
    """Key blocks of every query block, as `SelectionBuffers` has them: indices `[B, H, N, budget /
    block_k]` and counts `[B, H, N]`, int32."""
    config, scale, softcap, sliding, block_q = rest
    fields, sequences = settings(config), Sequences(table, q.shape[2], k.shape[2])
    # the search neither reads values nor writes an output
    x = Operands(q, KeyValues(k, k), Logits(scale, softcap, sliding, sinks), out=q)
    with launching(q, fields):
        selection = sparse.select_blocks(x, sequences, fields, block_q, None)
    return selection.indices, selection.counts


@select.register_fake
def _(q: Tensor, k: Tensor, sinks: Tensor | None, table: Tensor, *rest: Any) -> Pair:
    fields = settings(rest[0])
    heads = mask_heads(fields, q.shape[1], k.shape[1])
    shape = (q.shape[0], heads, Sequences(table, q.shape[2], k.shape[2]).blocks(rest[-1]))
    budget = fields.budget_blocks
    return q.new_empty(*shape, budget, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


def _call(*given: Any) -> tuple[HiPConfig, Operands, tuple[Part, ...]]:
    """What an attention operator was told, with where its results lie: as
    `backward.gradients` takes it."""
    q, k, v, sinks, out, lse, table, tail, indices, counts, *rest = given
    config, scale, softcap, sliding, block_q = rest
    fields, sizes = settings(config), (q.shape[2], k.shape[2])
    x = Operands(q, KeyValues(k, v), Logits(scale, softcap, sliding, sinks), out, lse)
    if block_q == 0:
        return fields, x, (Part(Sequences(table, *sizes), dense_reads()),)
    reads = Reads(block_q, fields.block_k, fields.sink, fields.window, indices, counts)
    if tail is None:
        return fields, x, (Part(Sequences(table, *sizes), reads),)
    head = table.clone()
    head[3] -= tail[3]
    dense = Sequences(tail, min(q.shape[2], fields.dense_tail), k.shape[2])
    return fields, x, (Part(Sequences(head, *sizes), reads), Part(dense, dense_reads()))


@torch.library.custom_op(
    "hip_hf::attend",
    mutates_args=(),
    schema=f"({_TENSORS}, {_LISTS}, {_SETTINGS}, SymInt block_q) -> (Tensor, Tensor)",
)
def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any) -> Pair:
    """Attention to sink, window and the blocks of `indices`; the rows of `tail` read everything.
    Out `[B, Hq, Tq, Dv]` and lse fp32 `[B, Hq, Tq]`; rows outside every sequence give 0 and
    -inf."""
    out, lse = _outputs(q, v)
    fields, x, parts = _call(q, k, v, sinks, out, lse, *rest)
    with launching(q, fields):
        sparse.attend_parts(x, parts, fields.sparse_reach if rest[-1] else k.shape[2])
    return out, lse


attend.register_fake(_fake_outputs)


@torch.library.custom_op(
    "hip_hf::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_LISTS},"
    f" {_SETTINGS}, SymInt block_q) -> (Tensor, Tensor, Tensor, Tensor)",
)
def attend_backward(grad_out: Tensor, grad_lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and, where there are any, of the sinks (else an empty tensor)."""
    fields, x, parts = _call(*rest)
    with launching(x.q, fields):
        *grads, of_sinks = gradients(x, parts, grad_out, grad_lse)
    return *grads, x.q.new_empty(0) if of_sinks is None else of_sinks


@attend_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    of_sinks = q.new_empty(0) if rest[0] is None else torch.empty_like(rest[0])
    return *map(torch.empty_like, (q, k, v)), of_sinks


@torch.library.custom_op(
    "hip_hf::decode_step",
    mutates_args=_STATE,
    schema=f"({_TENSORS}, Tensor table, {_WRITTEN}, {_SETTINGS}) -> Tensor",
)
def decode_step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any) -> Tensor:
    """`sparse.decode_step` on the tensors of a `DeviceState`: `[B, 1, Hq, Dv]`, as layers of models
    want it; 0 where a sequence has no row."""
    table, summaries, states, built, *kept, config, scale, softcap, sliding = rest
    fields, out = settings(config), q.new_zeros(q.shape[0], 1, q.shape[1], v.shape[3])
    pyramid = KeyPyramid(fields, summaries, states, built)
    scratch = sparse.step_scratch(fields, q, k.shape[1], v.shape[3])
    state = DeviceState(pyramid, SelectionBuffers(*kept), scratch)
    logits = Logits(scale, softcap, sliding, sinks)
    with launching(q, fields):
        x = Operands(q, KeyValues(k, v), logits, out.transpose(1, 2))
        sparse.decode_step(x, Sequences(table, 1, k.shape[2]), fields, state)
    return out


@decode_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, sinks, table, tail, indices, counts, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, table, tail, indices, counts)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Gradient, ...]:
    grads = attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    sinks = ctx.saved_tensors[3]
    return (*grads[:3], None if sinks is None else grads[3], *[None] * (4 + len(ctx.rest)))


attend.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "hip_hf::prompt",
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? key_start, Tensor? q_start, {_SETTINGS}) -> (Tensor, Tensor)",
)
def prompt(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any) -> Pair:
    """HyperAttention or Delta correction of a prompt: out `[B, Hq, Tq, Dv]` and lse fp32
    `[B, Hq, Tq]`. Leaves and anchors depend on its length, so `key_start` and `q_start`, where
    given, are read by the host: it waits for them."""
    key_start, q_start, config, scale, softcap, sliding = rest
    (out, lse), spans = _outputs(q, v), make_spans(q, k, key_start, q_start)
    problem = AttentionProblem(q, k, v, spans, scale, sliding, softcap, sinks)
    fields = settings(config)
    if spans:
        with launching(q, fields):
            run_by_kernels(problem, fields, None, out, lse, False)
    return out, lse


prompt.register_fake(_fake_outputs)


def attention_in_graph(
    problem: AttentionProblem,
    config: HiPConfig,
    dense: bool,
    key_start: Tensor | None,
    q_start: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`hip_attention` without a state, for a graph: out `[B, Hq, Tq, Dv]`, and lse fp32
    `[B, Hq, Tq]` if asked for. key_start and q_start are int `[B]`."""
    q, k, v, sinks = problem.q, problem.k, problem.v, problem.sinks
    told = (config.text, problem.scale, problem.softcap, problem.sliding_window)
    decoding, starts = q.shape[2] <= DECODE_ROWS, (key_start, q_start)
    table, tail = make_table(q, k, *starts, config.dense_tail)
    plain = all(x is None for x in (*starts, problem.sliding_window, problem.softcap, sinks))
    if dense and plain and not need_lse and q.shape[2] in (1, k.shape[2]):
        return grouped_sdpa(q, k, v, problem.scale, q.shape[2] > 1), None
    if not dense and kind_of(config) != "block_sparse":
        out, lse = prompt(q, k, v, sinks, *starts, *told)
        return out, lse if need_lse else None
    block_q = 0 if dense else 1 if decoding else config.block_q
    indices = counts = None
    if not dense and config.method == "hip":
        detached = (None if x is None else x.detach() for x in (q, k, sinks))
        indices, counts = select(*detached, table, *told, block_q)
    tails = None if dense or decoding or not config.dense_tail else tail
    out, lse = attend(q, k, v, sinks, table, tails, indices, counts, *told, block_q)
    return out, lse if need_lse else None
