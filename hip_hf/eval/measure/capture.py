"""What a model's attention layers compute on a text: the attention problem of every layer, from one
dense forward."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hip_hf.attention import attend
from hip_hf.config import HiPConfig
from hip_hf.integration.changes import set_item
from hip_hf.integration.masks import hip_mask, holds_positions, mask_spans, mask_window
from hip_hf.integration.settings import text_config
from hip_hf.problem import AttentionProblem, make_spans

CAPTURE = "hip_capture"
DENSE = HiPConfig(method="dense")

Problems = list[tuple[int, AttentionProblem]]
_problems: ContextVar[Problems | None] = ContextVar("captured problems", default=None)


def _capture_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for Transformers: dense attention that remembers what it was given."""
    problems = _problems.get()
    assert problems is not None, f"{CAPTURE} is only for `capture`"
    spans: tuple[Any, ...] | None = None
    if attention_mask is None:
        spans = make_spans(query, key)
    elif holds_positions(attention_mask):
        spans = mask_spans(attention_mask, query.shape[2])
    if spans is None or not getattr(module, "is_causal", True):
        got = f"{type(module).__name__} attends by a mask that is not causal"
        raise ValueError(f"model: {got}, allowed: causal attention")
    if attention_mask is not None:
        sliding_window = mask_window(attention_mask, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    problem = AttentionProblem(query, key, value, spans, scale, sliding_window, softcap, s_aux)
    problems.append((getattr(module, "layer_idx", len(problems)), problem))
    return attend(problem, DENSE).out.transpose(1, 2).contiguous(), None


def _register() -> None:
    """Let Transformers know the name `CAPTURE`, until `hip_hf.unregister`. It outlives a capture:
    another thread may be capturing as well."""
    if CAPTURE not in AttentionInterface._global_mapping:
        set_item(AttentionInterface._global_mapping, CAPTURE, _capture_attention)
        set_item(AttentionMaskInterface._global_mapping, CAPTURE, hip_mask)


@torch.no_grad()
def capture(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> list[AttentionProblem]:
    """Return the attention problem of each layer, in layer order, of a dense forward pass over
    `input_ids` `[B, T]` without a cache; `attention_mask` `[B, T]` marks padding by 0.

    The model's own attention implementation is back in place afterwards, also after an error.
    Raises ValueError if a layer's attention is not causal, or the model does not attend through
    Transformers' interface."""
    _register()
    config = text_config(model)
    before = config._attn_implementation
    problems: Problems = []
    token = _problems.set(problems)
    config._attn_implementation = CAPTURE
    try:
        decoder = getattr(model, model.base_model_prefix, model)  # which computes no logits
        decoder(input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        config._attn_implementation = before
        _problems.reset(token)
    if not problems:
        passes_by = "does not attend through Transformers' AttentionInterface"
        raise ValueError(f"model: {type(model).__name__} {passes_by}")
    return [problem for _, problem in sorted(problems, key=lambda item: item[0])]
