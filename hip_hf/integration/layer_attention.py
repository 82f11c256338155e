"""A call of an attention layer becomes an `AttentionProblem`, outside of the graphs of `torch.compile`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hip_hf.attention import Result, attend
from hip_hf.backends.keys_read import Count, share_of
from hip_hf.backends.torch import dense
from hip_hf.config import HiPConfig
from hip_hf.integration import continuous_batching
from hip_hf.integration.cache_layers import cache_kind, state_of
from hip_hf.integration.extension import extended, positions_of, refuse_followed, turned_back
from hip_hf.integration.holes import attend_runs, few_before, mask_runs
from hip_hf.integration.masks import (
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

_HOLES = "padding in the middle of a row"

# Arguments of a layer that change what attention means, and that we would silently ignore.
_REFUSED = {
    "position_bias": "a learned position bias",
    "indices": "the layer's own sparse indices",
    "block_indices": "the layer's own sparse indices",
}


@dataclass(frozen=True)
class Call:
    """What the last call of a layer did; `explain` shows it. `unmasked`: rows of a batch that came without a padding mask."""

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
    def share(self) -> float:
        """Of the visible keys, how many were read: counted here."""
        return share_of(self.count)


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
    """Attention of one layer: query `[B, Hq, Tq, D]`, key and value `[B, Hkv, Tk, D]` -> `[B, Tq, Hq, Dv]`.

    `unrotated`: query and key come from a patched layer, before RoPE.

    Raises:
        ValueError: the layer asks for something that would be computed wrongly, or the mask does not fit.
    """
    refuse(module, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_bidirectional(module, attention_mask, is_causal):
        problem = AttentionProblem(query, key, value, (), scale, None, softcap, s_aux)
        return _bidirectional(module, problem, attention_mask, scaling, kwargs)
    follower = tracing()
    if follower:
        problem = AttentionProblem(query, key, value, (), scale, sliding_window, softcap, s_aux)
        return _followed(follower, module, problem, attention_mask)
    cache = continuous_batching.cache_of(key, kwargs)
    settings = layer_settings(module, method)
    layer: Any = layer_index(module)
    if attention_mask is not None:
        attention_mask = narrowed(attention_mask, key.shape[2])
    if cache is None and attention_mask is not None:
        check_mask(attention_mask, query.shape, key.shape[2])
        sliding_window = mask_window(attention_mask, sliding_window)
    state = state_of(key, module.config.model_type)  # type: ignore[union-attr, arg-type]
    kind, positions = cache_kind(key, state, query.shape[2]), None
    if state is not None:
        state = state.of_layer(layer)
    if unrotated or extended(module, sliding_window):
        positions = positions_of(module, settings)
        if not unrotated:
            query, key = turned_back(positions, query, key, cache)
    problem = AttentionProblem(query, key, value, (), scale, sliding_window, softcap, s_aux, positions)
    if cache is not None:  # continuous batching: packed requests, whose mask says nothing we need
        if sliding_window is None:
            problem = replace(problem, sliding_window=getattr(module, "sliding_window", None))
        result = continuous_batching.continuous(problem, settings, layer, cache, kwargs)
        module.__dict__["_hip_call"] = Call.of(settings, result, "continuous batching")
        return result.out.transpose(1, 2).contiguous(), None
    why = _unsayable(attention_mask, query.shape[2])
    runs = mask_runs(attention_mask, query.shape[2]) if attention_mask is not None and why == _HOLES else []
    if why and positions is not None:
        raise ValueError(f"attention_mask: {why}, allowed with `extend`: a causal mask, padded on either side")
    if runs and few_before(problem, settings, runs):
        result = attend_runs(problem, settings, layer, state, runs)
        out, call = result.out, Call.of(settings, result, kind)
    elif why:
        out = _under(attention_mask, sliding_window, problem)
        call = Call(settings.method, "dense", why, None, kind)
        _warn_once(layer, why)
    else:
        spans = make_spans(query, key) if attention_mask is None else mask_spans(attention_mask, query.shape[2])
        problem = replace(problem, spans=spans or ())
        result = attend(problem, settings, layer, state)
        out = result.out
        call = Call.of(settings, result, kind, unmasked_rows(attention_mask, len(query)))
        if result.unsupported:
            _warn_once(layer, result.reason)
    module.__dict__["_hip_call"] = call
    return out.transpose(1, 2).contiguous(), None


def is_bidirectional(module: nn.Module, mask: torch.Tensor | None, is_causal: bool | None) -> bool:
    """Whether the rows of a call see the keys behind them as well. `is_causal`: None where only the layer itself says it."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # a mask of integers is made by hip and says itself what is causal, whatever the layer says (the decoder of BigBird-Pegasus)
    return not is_causal and (mask is None or not holds_positions(mask))


def refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a layer that asks for something that would be computed wrongly. `kwargs`: its further arguments."""
    if dropout:
        raise ValueError(f"dropout: got {dropout}, allowed: 0 (sparse attention has no attention dropout)")
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(NO_ATTENTIONS)
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {type(module).__name__} passes {what}, allowed: None")


def _unsayable(mask: torch.Tensor | None, rows: int) -> str:
    """Why a mask cannot be said by spans, or an empty string."""
    if mask is None:
        return ""
    if not holds_positions(mask):
        return "the mask is not causal, or not made by hip"
    return _HOLES if mask_spans(mask, rows) is None else ""


def _under(mask: torch.Tensor | None, window: int | None, problem: AttentionProblem) -> torch.Tensor:
    """Dense attention `[B, Hq, Tq, Dv]` under any mask; None: the query rows are the last ones."""
    return dense.masked(problem, visible_rows(mask, window, problem.q.shape[2], problem.k))[0]


def _followed(
    follower: str, module: nn.Module, problem: AttentionProblem, mask: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    """A call whose tensors `follower` follows (torch.export, torch.func), which could not follow a selection: it is dense, and
    no number of a tensor is looked at."""
    refuse_followed(module.config, follower)
    window, keys = problem.sliding_window, problem.k.shape[2]
    if mask is not None:
        mask = narrowed(mask, keys)
        check_mask(mask, problem.q.shape, keys)
        window = mask_window(mask, window)
    out = _under(mask, window, problem)
    if follower != "torch.export":  # in which Python leaves no traces
        why = f"{follower} follows the tensors, and could not follow a selection"
        module.__dict__["_hip_call"] = Call("dense", "dense", why, None, "none")
        _warn_once(layer_index(module), why)
    return out.transpose(1, 2).contiguous(), None


def _bidirectional(
    module: nn.Module,
    problem: AttentionProblem,
    mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    module.__dict__["_hip_call"] = Call("dense", "dense", "attention is not causal", None, "none")
    q, k, v = problem.q, problem.k, problem.v
    if problem.softcap is None and problem.sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=False, **kwargs)
    seen = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask
    return _under(seen, None, problem).transpose(1, 2).contiguous(), None


_warned: set[str] = set()


def _warn_once(layer: int | None, reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        text = f"hip: layer {layer} was computed densely: {reason}. hip_hf.explain(model) shows every layer's path."
        warnings.warn(text, stacklevel=4)
