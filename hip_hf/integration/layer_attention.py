"""A call of an attention layer becomes an `AttentionProblem`; not in graphs of `torch.compile`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from hip_hf.attention import Result, attend
from hip_hf.backends.keys_read import Count, all_keys, density_of
from hip_hf.backends.tensors import merge
from hip_hf.backends.torch import dense
from hip_hf.cache.pages import rows_of
from hip_hf.config import HiPConfig
from hip_hf.geometry import Span
from hip_hf.integration import continuous_batching
from hip_hf.integration.cache_layers import cache_kind, state_of
from hip_hf.integration.extension import extended, positions_of, refuse_followed, unrotate
from hip_hf.integration.masks import (
    LAST,
    check_mask,
    holds_positions,
    mask_spans,
    mask_window,
    narrowed,
    unmasked_rows,
    visible_rows,
)
from hip_hf.integration.model_checks import NO_ATTENTIONS
from hip_hf.integration.settings import layer_index, layer_settings
from hip_hf.problem import AttentionProblem, make_spans, tracing
from hip_hf.shown import refused
from hip_hf.state import DecodeState

# Arguments of a layer that change what attention means, and that we would silently ignore.
_REFUSED = {
    "position_bias": "a learned position bias",
    "indices": "the layer's own sparse indices",
    "block_indices": "the layer's own sparse indices",
}


@dataclass(frozen=True, eq=False)
class Call:
    """What the last call of a layer did; `explain` shows it. `unmasked`: rows of a batch that came
    without a padding mask."""

    method: str
    path: str
    reason: str
    count: Count | None  # of the keys that were read; None: all
    cache: str
    unmasked: int = 0

    @staticmethod
    def of(settings: HiPConfig, result: Result, cache: str, unmasked: int = 0) -> Call:
        """What `explain` shows of a result, without its tensors."""
        return Call(settings.method, result.path, result.reason, result.count, cache, unmasked)

    @property
    def density(self) -> float:
        """Return the fraction of the visible keys that were read. It is counted here."""
        return density_of(self.count)


def attend_layer(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    method: str | None = None,
    unrotated: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query `[B, Hq, Tq, D]`, key and value `[B, Hkv, Tk, D]` ->
    `[B, Tq, Hq, Dv]`. `unrotated`: query and key come from a patched layer, before RoPE. Raises
    ValueError if the layer asks for what would be computed wrongly, or the mask does not fit."""
    check_layer_call(module, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask, rows, follower = attention_mask, query.shape[2], tracing()
    if is_bidirectional(module, mask, is_causal):
        problem = AttentionProblem(query, key, value, (), scale, None, softcap, s_aux)
        return _bidirectional(module, problem, mask, scaling, kwargs)
    if follower:
        refuse_followed(module.config, follower)
    cache = None if follower else continuous_batching.cache_of(key, kwargs)
    if cache is None and mask is not None:
        mask = narrowed(mask, key.shape[2])
        check_mask(mask, query.shape, key.shape[2])
        sliding_window = mask_window(mask, sliding_window)
    if follower:
        problem = AttentionProblem(query, key, value, (), scale, sliding_window, softcap, s_aux)
        return _followed(follower, module, problem, mask)
    settings = layer_settings(module, method)
    layer: Any = layer_index(module)
    state = state_of(key, module.config.model_type)  # type: ignore[union-attr, arg-type]
    kind, positions = cache_kind(key, state, rows), None
    if state is not None:
        state = state.of_layer(layer)
    if unrotated or extended(module, sliding_window):
        positions = positions_of(module, settings)
        if not unrotated:
            query, key = unrotate(positions, query, key, cache)
    spans, why, runs = None, "", []
    if cache is not None:  # its requests are packed, and their mask is not needed
        kind = "continuous batching"
        if sliding_window is None:
            sliding_window = getattr(module, "sliding_window", None)
    elif mask is None:
        spans = make_spans(query, key)
    elif not holds_positions(mask):
        why = "the mask is not causal, or not made by hip"
    else:
        spans = mask_spans(mask, rows)
        if spans is None:
            why, runs = "padding in the middle of a row", mask_runs(mask, rows)
    if why and positions is not None:
        allowed = "allowed with `extend`: a causal mask, padded on either side"
        raise ValueError(f"attention_mask: {why}, {allowed}")
    given = (query, key, value, spans or ())
    problem = AttentionProblem(*given, scale, sliding_window, softcap, s_aux, positions)
    if cache is not None:
        result = continuous_batching.continuous(problem, settings, layer, cache, kwargs)
    elif runs and few_before(problem, settings, runs):
        result = attend_runs(problem, settings, layer, state, runs)
    elif why:
        result = Result(_under(mask, problem), None, None, "dense", why, None, unsupported=True)
    else:
        result = attend(problem, settings, layer, state)
    if result.unsupported:
        _warn_once(layer, result.reason)
    module.__dict__["_hip_call"] = Call.of(settings, result, kind, unmasked_rows(mask, len(query)))
    return result.out.transpose(1, 2).contiguous(), None


def is_bidirectional(module: nn.Module, mask: torch.Tensor | None, is_causal: bool | None) -> bool:
    """Whether the rows of a call see the keys after them as well. `mask` is a position mask
    `[B, 1, 1, Tk]` or one of the model's own; `is_causal` is None where only the layer itself says
    it."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # a mask of integers is made by hip and says itself what is causal, whatever the layer says (the
    # decoder of BigBird-Pegasus)
    return not is_causal and (mask is None or not holds_positions(mask))


def check_layer_call(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a layer that asks for something that would be computed wrongly.
    `kwargs`: its further arguments."""
    if dropout:
        raise refused("dropout", f"{dropout}", "0 (sparse attention has no attention dropout)")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(NO_ATTENTIONS)
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {type(module).__name__} passes {what}, allowed: None")


def _under(mask: torch.Tensor | None, problem: AttentionProblem) -> torch.Tensor:
    """Dense attention `[B, Hq, Tq, Dv]` under any mask; None: the query rows are the last ones."""
    seen = visible_rows(mask, problem.sliding_window, problem.q.shape[2], problem.k)
    return dense.masked(problem, seen)[0]


def _followed(
    follower: str, module: nn.Module, problem: AttentionProblem, mask: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    """A call whose tensors `follower` follows (torch.export, torch.func), which could not follow a
    selection: it is dense, and no number of a tensor is looked at."""
    out = _under(mask, problem)
    if follower != "torch.export":  # in which Python leaves no traces
        why = f"{follower} follows the tensors, and could not follow a selection"
        module.__dict__["_hip_call"] = Call("dense", "dense", why, None, "none")
        _warn_once(layer_index(module), why)
    return out.transpose(1, 2).contiguous(), None


def _bidirectional(
    module: nn.Module, problem: AttentionProblem, mask: Any, scaling: float | None, kwargs: Any
) -> tuple[torch.Tensor, None]:
    module.__dict__["_hip_call"] = Call("dense", "dense", "attention is not causal", None, "none")
    q, k, v = problem.q, problem.k, problem.v
    if problem.softcap is None and problem.sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs |= dict(scaling=scaling, is_causal=False)
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)
    if mask is None:  # which would stand for a causal one
        mask = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    return _under(mask, problem).transpose(1, 2).contiguous(), None


_warned: set[str] = set()


def _warn_once(layer: int | None, reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        text = f"hip: layer {layer} was computed densely: {reason}."
        warnings.warn(f"{text} hip_hf.explain(model) shows every layer's path.", stacklevel=4)


# Padding in the middle of a batch row: what comes before the last run of real keys is read whole,
# and merged with the rest. Prompt and prefix tuning put a few learned tokens before a left-padded
# prompt. Each run of keys is a sequence by itself for its own query rows; rows of a later run also
# see all keys of the runs before.


def mask_runs(mask: torch.Tensor, rows: int) -> list[Span]:
    """The runs of real keys of every batch row, as spans; without rows where a run holds no query.
    `mask`: one of hip's, of positions. Worked out once per forward."""
    known = getattr(mask, "_hip_runs", None)
    if known is not None and known[0] == rows:
        return known[1]
    places = mask[:, 0, 0].cpu() - LAST + rows - 1  # the query rows are at 0 to rows - 1
    real = places < rows  # else padding, or beyond the last query
    goes_on = real[:, 1:] & real[:, :-1] & (places.diff() == 1)
    edge = torch.zeros_like(real[:, :1])
    starts = (real & ~torch.cat([edge, goes_on], dim=1)).nonzero().tolist()
    ends = (real & ~torch.cat([goes_on, edge], dim=1)).nonzero().tolist()
    runs = []
    for (batch, start), (_, last) in zip(starts, ends, strict=True):
        at = int(places[batch, start])
        first, end = max(0, at), max(0, at + last + 1 - start)
        runs.append(Span(batch, start, last + 1, first, end, first - at))
    mask._hip_runs = (rows, runs)  # type: ignore[attr-defined]
    return runs


def before(runs: list[Span], run: Span) -> list[Span]:
    """The runs of the same batch row before this one."""
    return [other for other in runs if other.batch == run.batch and other.key_start < run.key_start]


def few_before(problem: AttentionProblem, config: HiPConfig, runs: list[Span]) -> bool:
    """Whether what comes before can be read whole: it is no more than a sparse row reads anyway."""
    if problem.sliding_window is not None or problem.positions is not None:
        return False
    reach = config.sparse_reach
    return all(sum(other.keys for other in before(runs, run)) <= reach for run in runs)


def attend_runs(
    problem: AttentionProblem,
    config: HiPConfig,
    layer: int | None,
    state: DecodeState | None,
    runs: list[Span],
) -> Result:
    """Attention of every run to itself, as the settings say, and to all keys of runs before it."""
    spans = tuple(run for run in runs if run.rows > 0)
    if len({span.batch for span in spans}) < len(spans):
        state = None  # it follows one sequence a batch row: decode will
    result = attend(replace(problem, spans=spans), config, layer, state, need_lse=True)
    assert result.lse is not None
    out = result.out.clone()
    for span in spans:
        rows = slice(span.row_start, span.row_end)
        own_lse = result.lse[span.batch, :, rows]
        own = out[span.batch, :, rows].to(own_lse.dtype)
        for other in before(runs, span):
            more, more_lse = _whole(problem, span, other)
            own_lse = merge(own, own_lse, more.to(own.dtype), more_lse)
        out[span.batch, :, rows] = own
    count = partial(_count, result.count, spans, runs)
    return replace(result, out=out, lse=None, count=count, unsupported=False)


def _count(count: Count | None, spans: tuple[Span, ...], runs: list[Span]) -> tuple[float, float]:
    """Keys read and keys in sight, those of the runs before among both."""
    read, visible = count() if count is not None else all_keys(spans, None)
    whole = sum(span.rows * other.keys for span in spans for other in before(runs, span))
    return read + whole, visible + whole


def _whole(problem: AttentionProblem, span: Span, other: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a span's rows for all keys of another. (Sink logits count once,
    with the rows' own keys.)"""
    q = problem.q[span.batch, :, span.row_start : span.row_end][None]
    keys = (other.batch, other.key_start, other.key_end)
    k, v = (rows_of(x, *keys)[:, :][None] for x in (problem.k, problem.v))
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    part = replace(problem, q=q, k=k, v=v, sinks=None)
    out, lse = dense.masked(part, lambda *_: everything, need_lse=True)
    assert lse is not None
    return out[0], lse[0]
