"""Attention on tensors (`hip_attention`), sparse or dense: decided in one place, with a reason."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hip_hf.backends import base, choice
from hip_hf.backends.base import Piece, Result, has_gradients
from hip_hf.backends.mixed import CallPart, merge_results, split_call
from hip_hf.backends.tensors import tensors_of
from hip_hf.backends.torch import dense
from hip_hf.backends.torch.backward import traced
from hip_hf.backends.torch.decode_buffer import attend_next, buffered_rows, new_keys
from hip_hf.cache.pages import PagedTensor
from hip_hf.config import HiPConfig
from hip_hf.geometry import DECODE_ROWS, BlockMask, Span
from hip_hf.methods.base import method_of, summarises
from hip_hf.problem import (
    DTYPES,
    AttentionProblem,
    by_tokens,
    check_call,
    check_finite,
    check_numbers,
    check_tensors,
    fail,
    make_spans,
    tracing,
)
from hip_hf.rope import Positions
from hip_hf.state import DecodeState
from hip_hf.workers import compute_dtype

# With AMX PyTorch's own attention is four times as fast in bf16 as without, the sparse path less
# than twice.
BF16_PROMPTS = 24576 if torch.cpu._is_amx_tile_supported() else 2048
# Where the sparse path starts to win over dense attention on a CPU, by the dtype it multiplies in,
# in prefill and in decode, in decode that selects at every step (`hip-hf latency`,
# docs/performance.md), and in a call of a few rows, which each select: dense, they read the keys
# together (2 to 16 rows break even at 20K to 50K keys).
DENSE_BELOW = dict.fromkeys(DTYPES, (10240, 4096, 16384, 16384))
DENSE_BELOW[torch.bfloat16] = (BF16_PROMPTS, 2048, 2048, 16384)
# The same on a GPU. Not measured: from the model in docs/performance.md, where a decode step is
# bound by its launches.
DENSE_BELOW_GPU = (16384, 65536, 65536, 65536)


def dense_reason(
    problem: AttentionProblem, config: HiPConfig, layer: int | None, stateless: bool
) -> tuple[str, bool]:
    """Why this call must be dense, or an empty string; and whether that is for want of support. All
    that settings and a problem decide is decided here."""
    if config.method == "dense":
        return "method is dense", False
    if config.is_dense_layer(layer):
        return "dense layer", False
    if problem.sliding_window is not None and problem.sliding_window <= config.sparse_reach:
        return f"sliding window of {problem.sliding_window} is within the sparse set", False
    decoding = problem.q.shape[2] <= DECODE_ROWS
    reason, unsupported = method_of(config.method).dense_reason(problem, config, decoding)
    if reason:
        return reason, unsupported
    if problem.needs_grad and not has_gradients(config):
        what = f"method {config.method}" if config.delta is None else "Delta correction"
        return f"{what} has no gradients", True
    if decoding and stateless and config.delta is not None:
        return "Delta correction of a decode step needs kept state", False
    if decoding and stateless and problem.sliding_window is not None:
        # a cache that drops old keys shifts every key block at every step: nothing could be kept
        return f"decode within a sliding window of {problem.sliding_window}", False
    below = _dense_below(problem, config, decoding)
    if problem.longest < below or (below and problem.longest <= config.sparse_reach):
        if torch.compiler.is_compiling():  # which cannot put numbers into text
            return "short context", False
        if problem.longest < below:
            return f"context of {problem.longest} is below dense_below={below}", False
        return f"the budget covers the context of {problem.longest}", False
    anew = decoding and stateless and config.dense_below is None and problem.positions is None
    if anew and problem.q.device.type == "cpu" and summarises(config):
        # both read all keys, and to summarise them costs more than to read the values too
        # (docs/decisions.md)
        why = "to summarise all keys anew takes longer than to read them"
        return f"decode without kept state: {why}", False
    if config.backend == "auto" and choice.kernels_wanted(problem, config):
        why, said = choice.no_kernels(problem, config)
        return why and f"no kernels: {why}", bool(why) and not said
    return "", False


def _dense_below(problem: AttentionProblem, config: HiPConfig, decoding: bool) -> int:
    """The length from which on a context is worth the sparse path."""
    if config.dense_below is not None:
        return config.dense_below
    on_gpu = problem.q.device.type == "cuda"
    lengths = DENSE_BELOW_GPU if on_gpu else DENSE_BELOW[compute_dtype(problem.q)]
    if not decoding:
        return lengths[0]
    # candidates of assisted decoding go the way of plain decoding where they are to give its very
    # tokens
    if config.decode_refresh == 1:
        return lengths[2]
    return lengths[3] if any(span.rows > 1 for span in problem.spans) else lengths[1]


def attend(
    problem: AttentionProblem,
    config: HiPConfig,
    layer: int | None = None,
    state: DecodeState | None = None,
    need_lse: bool = False,
    need_mask: bool = False,
) -> Result:
    """Attention of a validated problem. Rows outside every span give 0, and -inf as log-sum-exp.

    If the call fails or is interrupted, the state forgets all, and the next call starts afresh."""
    try:
        return _attend(problem, config.for_layer(layer), layer, state, need_lse, need_mask)
    except BaseException as error:
        # a ValueError refuses a call before it changes anything
        if state is not None and not isinstance(error, ValueError):
            state.reset()
        raise


def _attend(
    problem: AttentionProblem,
    config: HiPConfig,
    layer: int | None,
    state: DecodeState | None,
    need_lse: bool,
    need_mask: bool,
) -> Result:
    """`attend` with the settings of the layer."""
    if state is not None and not need_mask and not choice.kernels_wanted(problem, config):
        rows = buffered_rows(problem, config, state)
        if rows is not None:
            out, lse = empty_outputs(problem, need_lse)
            return attend_next(problem, rows, new_keys(problem), out, lse)
    if problem.positions is not None and problem.needs_grad:
        got = f"{config.extend!r} where gradients are asked for"
        fail("extend", got, "torch.no_grad(), or extend=None")
    if not problem.spans:
        return Result(*empty_outputs(problem, need_lse), None, "dense", "no row has a key", None)
    parts = split_call(problem, lambda one: dense_reason(one, config, layer, state is None))
    results = [_attend_part(part, config, state, need_lse, need_mask) for part in parts]
    # not only steps behind padding
    if len(parts) == 1 and parts[0].problem.q.shape == problem.q.shape:
        return results[0]
    return merge_results(problem, parts, results)


def _attend_part(
    part: CallPart, config: HiPConfig, state: DecodeState | None, need_lse: bool, need_mask: bool
) -> Result:
    """Attention of the sequences of a call that go the same way."""
    problem = part.problem
    if part.reason:
        if state is not None:
            for span in problem.spans:
                state.row(span.batch, span.key_start, span.position, span.end)
                state.select_anew(span.batch)
        out, lse = attend_dense(problem, config, need_lse)
        return Result(out, lse, None, "dense", part.reason, None, part.unsupported)
    if choice.backend_of(problem, config) == "triton":
        return _attend_by_kernels(part, config, state, need_lse, need_mask)
    if state is not None and state.device is not None:
        state.leave_device()
    # all kinds of attention: most calls are of one
    from hip_hf.backends.torch.dispatch import EXECUTORS

    pieces: list[Piece] | None = [] if problem.needs_grad else None
    out, lse = empty_outputs(problem, need_lse or pieces is not None)
    sparse = EXECUTORS.pick(config)(problem, config, out, lse, need_mask)
    sparse.pieces = pieces
    out, lse = traced(problem, lambda: sparse.run(state), out, lse, pieces)
    lse = lse if need_lse else None
    return Result(out, lse, sparse.mask, "sparse", "", sparse.count)


def _attend_by_kernels(
    part: CallPart, config: HiPConfig, state: DecodeState | None, need_lse: bool, need_mask: bool
) -> Result:
    """Attention of a part that the kernels serve. Where Triton refuses them after all, because
    these settings ask for more than the device has, it and all later ones are dense with `auto`."""
    from hip_hf.backends.triton import trust
    from hip_hf.backends.triton.dispatch import run_by_kernels

    problem = part.problem
    outputs = empty_outputs(problem, need_lse, for_models=True)
    try:
        call = run_by_kernels(problem, config, state, *outputs, need_mask)
    except Exception as error:
        if not trust.refuses(error, config):
            raise
        why = trust.note_refusal(problem.q.device, config.text, error)
        trust.warn_once(why)
        if state is not None:
            state.reset()
        densely = replace(part, reason=f"no kernels: {why}")
        return _attend_part(densely, config, state, need_lse, need_mask)
    lse = call.lse if need_lse else None
    return Result(call.out, lse, call.mask, "sparse", "", call.count)


def empty_outputs(
    problem: AttentionProblem, need_lse: bool, for_models: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Where the output and the log-sum-exp are written: 0 and -inf where no span has the row, else
    uninitialised.

    `for_models`: the output lies by tokens (`problem.by_tokens`)."""
    q, dim = problem.q, problem.v.shape[-1]
    out = by_tokens(q, dim) if for_models else q.new_empty(*q.shape[:3], dim)
    lse = None
    if need_lse:
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    if sum(span.rows for span in problem.spans) < q.shape[0] * q.shape[2]:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
    return out, lse


def with_rope(problem: AttentionProblem) -> AttentionProblem:
    """The problem with q and k rotated to their true positions. O(T): where all of the keys are
    read anyway."""
    assert problem.positions is not None
    rope, trained = problem.positions.rope, problem.k.shape[2]
    q, k = torch.empty_like(problem.q), rope.keys(problem.k, 0, trained)
    for span in problem.spans:
        rows = slice(span.row_start, span.row_end)
        at = span.key_start + span.position
        q[span.batch, :, rows] = rope.queries(problem.q[span.batch, :, rows], at, trained)
    return replace(problem, q=q, k=k, positions=None)


def dense_by_kernels(problem: AttentionProblem, config: HiPConfig, need_lse: bool) -> bool:
    """Whether dense attention is left to the kernels: where PyTorch's own cannot serve."""
    if not choice.kernels_wanted(problem, config) or dense.sdpa_serves(problem, need_lse):
        return False
    if isinstance(problem.k, PagedTensor) and problem.needs_grad:
        return False
    return not choice.no_kernels(problem, config, densely=True)[0]


def takes_masks(problem: AttentionProblem) -> bool:
    """Whether PyTorch's attention is given masks where it needs them: on a GPU, unless a backward
    pass would keep as many numbers as there are logits, or all keys of an offloaded cache would
    have to be brought together."""
    return problem.q.device.type == "cuda" and not (problem.needs_grad or choice.offloaded(problem))


def attend_dense(
    problem: AttentionProblem, config: HiPConfig, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention: the output, and the log-sum-exp if asked for."""
    prompt = problem.q.shape[2] > DECODE_ROWS and not isinstance(problem.k, PagedTensor)
    if prompt and problem.positions is not None and problem.longest <= problem.positions.trained:
        problem = with_rope(problem)
    if dense_by_kernels(problem, config, need_lse):
        from hip_hf.backends.triton.dense import attend_densely

        return attend_densely(problem, config, *empty_outputs(problem, need_lse, for_models=True))
    serves = dense.sdpa_serves_masked if takes_masks(problem) else dense.sdpa_serves
    served = serves(problem, need_lse)
    if served and dense.spans_alike(problem):
        return dense.sdpa(problem, problem.spans[0]), None
    if served:
        out, _ = empty_outputs(problem, False)
        for span in problem.spans:
            batch = slice(span.batch, span.batch + 1)
            out[batch, :, span.row_start : span.row_end] = dense.sdpa(problem, span, batch)
        return out, None
    pieces: list[Piece] | None = [] if problem.needs_grad else None
    out, lse = empty_outputs(problem, need_lse or pieces is not None)

    def compute() -> None:
        for span in problem.spans:
            dense.attend_rows(tensors_of(problem, span, out, lse), 0, span, pieces)

    out, lse = traced(problem, compute, out, lse, pieces)
    return out, lse if need_lse else None


def _in_graph(
    problem: AttentionProblem,
    config: HiPConfig,
    layer: int | None,
    key_start: Tensor | None,
    q_start: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`hip_attention` by operators that a compiled graph can hold. They read lengths on the device,
    so the choice between sparse and dense looks at the shapes alone, and nothing looks for NaN."""
    from hip_hf.backends.triton import ops

    config = config.for_layer(layer)
    dense = bool(dense_reason(problem, config, layer, True)[0])
    return ops.attention_in_graph(problem, config, dense, key_start, q_start, need_lse)


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: HiPConfig | None = None,
    scale: float | None = None,
    key_start: Tensor | None = None,
    q_start: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    state: DecodeState | None = None,
    layer: int | None = None,
    positions: Positions | None = None,
    return_lse: bool = False,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor | BlockMask | None, ...]:
    """Causal attention of `q` to the keys that the configured method selects.

    Args:
        q: `[B, Hq, Tq, D]`; k: `[B, Hkv, Tk, D]`; v: `[B, Hkv, Tk, Dv]`; float16, bfloat16, float32
            or float64.
        config: settings; default `HiPConfig()`.
        scale: of the logits; default `D ** -0.5`.
        key_start: int `[B]`, first real key of each row; earlier ones are padding.
        q_start: int `[B]`, key slot of the first query row; default `Tk - Tq`.
        sliding_window: keys in sight of a row, itself included.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: `[Hq]`, one extra logit per query head that takes part in the softmax.
        state: kept between decode calls on a growing cache; without it decode is dense by default
            (on a CPU), as rebuilding the pyramid, O(T), takes longer.
        layer: index for the layer rules (`dense_layers`, `layers`); None: they do not apply.
        positions: with `config.extend`: q and k are not rotated, and this rotates them
            (InfiniteHiP's context extension).

    Returns:
        out `[B, Hq, Tq, Dv]`; then, where asked for, lse `[B, Hq, Tq]` (fp32, fp64 for fp64;
        natural log; sinks included) and the `BlockMask` (None if the call went dense). A row
        without any key gives 0 and -inf.

    Raises:
        ValueError: tensors that do not fit together, out-of-range arguments, NaN or infinity in q
            or k (looked for on CPUs; on a GPU that would wait for the device). Nothing has been
            computed and `state` is as it was.
    """
    config = HiPConfig() if config is None else config
    if not isinstance(config, HiPConfig):
        fail("config", type(config).__name__, "HiPConfig")
    if state is not None and not isinstance(state, DecodeState):
        fail("state", type(state).__name__, "None or a DecodeState")
    check_tensors(q, k, v)
    follower = tracing()
    check_numbers(scale=scale, softcap=softcap)
    # a trace makes a tensor of the default
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    problem = AttentionProblem(q, k, v, (), scale, sliding_window, softcap, sinks, positions)
    check_call(problem, config, layer, numbers=not follower)
    if follower:
        if positions is not None:
            got = f"Positions under {follower}, which gets dense attention"
            fail("positions", got, "None")
        out, lse = dense.masked(problem, dense.sight(problem, key_start, q_start), return_lse)
        return _answer(out, lse, None, return_lse, return_mask)
    if torch.compiler.is_compiling() and state is None and positions is None and not return_mask:
        ends = Span(0, 0, k.shape[2], 0, q.shape[2], k.shape[2] - q.shape[2])
        whole = AttentionProblem(q, k, v, (ends,), scale, sliding_window, softcap, sinks)
        if choice.kernels_serve(whole, config):
            out, lse = _in_graph(whole, config, layer, key_start, q_start, return_lse)
            return _answer(out, lse, None, return_lse, False)
    spans = make_spans(q, k, key_start, q_start)
    if q.device.type == "cpu":
        check_finite("q", q, spans, rows=True)
        # a step on a kept state must not read the whole cache: its new keys are the last ones
        new = spans
        if state is not None and q.shape[2] <= DECODE_ROWS:  # the keys of the query rows alone
            new = tuple(replace(span, key_start=span.key_start + span.position) for span in spans)
        check_finite("k", k, new, rows=False)
    problem = replace(problem, spans=spans)
    result = attend(problem, config, layer, state, return_lse, return_mask)
    return _answer(result.out, result.lse, result.mask, return_lse, return_mask)


def _answer(
    out: Tensor, lse: Tensor | None, mask: BlockMask | None, return_lse: bool, return_mask: bool
) -> Tensor | tuple[Tensor | BlockMask | None, ...]:
    """What `hip_attention` gives back: the output, and what else was asked for."""
    if not return_lse and not return_mask:
        return out
    extra = ([lse] if return_lse else []) + ([mask] if return_mask else [])
    return (out, *extra)


base.attend = attend
