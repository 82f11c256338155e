"""The attention function registered with Transformers: a call of a layer goes on as it is, or in a
graph of `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hip_hf.cache.pages import PagedTensor
from hip_hf.integration import continuous_batching
from hip_hf.integration.cache_layers import CUT_OFF, cut_off, outside_of_graphs, spoil
from hip_hf.integration.layer_attention import attend_layer, check_layer_call, is_bidirectional
from hip_hf.problem import tracing


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attend as `attend_layer` does, query `[B, Hq, Tq, D]` and key `[B, Hkv, Tk, D]` ->
    `[B, Tq, Hq, Dv]`. A `HiPCache` has the call's tokens already, so it is marked as unusable where
    attention fails. A backward pass through tokens whose gradients it has cut off raises an
    error."""
    if torch.compiler.is_compiling():
        return _compiled(module, query, key, *args, **kwargs)
    try:
        cached = isinstance(key, PagedTensor) and torch.is_grad_enabled()
        if not cached or not (query.requires_grad or getattr(key, CUT_OFF, False)):
            return attend_layer(module, query, key, *args, **kwargs)
        with torch.no_grad():
            out, _ = attend_layer(module, query, key, *args, **kwargs)
        return cut_off(out), None
    except BaseException as error:
        spoil(key, module.config.model_type, error)  # type: ignore[union-attr, arg-type]
        raise


def _compiled(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **fields: Any,
) -> tuple[torch.Tensor, None]:
    """`attention_forward` while a graph is being made: an operator of the graph, or a call at which
    it breaks. What is dense whatever the settings say (bidirectional, `torch.export`) is made of
    tensor operations, which any graph can hold."""
    if is_bidirectional(module, attention_mask, fields.get("is_causal")) or tracing():
        return attend_layer(module, query, key, value, attention_mask, dropout, **fields)
    check_layer_call(module, dropout, fields)
    from hip_hf.integration import in_graph  # an operator takes long to register

    if continuous_batching.cache_of(key, fields) is None and in_graph.serves(query, key):
        return in_graph.layer_in_graph(module, query, key, value, attention_mask, **fields), None
    return outside_of_graphs(
        attention_forward, module, query, key, value, attention_mask, dropout, **fields
    )
