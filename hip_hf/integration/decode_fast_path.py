"""The usual decode step of a patched layer: one token a sequence. It skips the checks of the
interface, and gives the same bits.

Where nothing is selected, and all that the step reads but its own key lies side by side already
(`torch/decode_buffer.py`), the token goes straight into its page and into what is gathered, without
any handle to pages. Kernels that have served the cache before are called directly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hip_hf.attention import attend
from hip_hf.backends.choice import kernels_wanted
from hip_hf.backends.torch.decode_buffer import attend_next, buffered_rows
from hip_hf.config import HiPConfig
from hip_hf.integration.extension import positions_of
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.layer_attention import Call
from hip_hf.integration.masks import holds_positions, mask_spans, mask_window, unmasked_rows
from hip_hf.integration.paged_layer import PagedLayer
from hip_hf.problem import AttentionProblem


def next_token(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Any,
    settings: HiPConfig,
    unrotated: bool,
) -> torch.Tensor | None:
    """Append keys and values `[B, Hkv, 1, D]` to the layer's pages and attend: query
    `[B, Hq, 1, D]` -> `[B, 1, Hq, Dv]`. None, and nothing has changed, for any other step."""
    if torch.compiler.is_compiling() or not isinstance(cache, HiPCache):
        return None
    layer = cache.layers[module.layer_idx]
    if mask is None or not holds_positions(mask) or not isinstance(layer, PagedLayer):
        return None
    if len(layer.tables) != len(query) or mask.shape[-1] != layer.length + 1:
        return None
    spans = mask_spans(mask, 1)
    if mask_window(mask, None) is not None or spans is None or len(spans) < len(query):
        return None
    positions = positions_of(module, settings) if unrotated else None
    problem = AttentionProblem(query, key, value, spans, module.scaling, positions=positions)
    if problem.needs_grad or (layer.cut_off and torch.is_grad_enabled()):
        return None
    rows, unmasked = None, unmasked_rows(mask, len(query))
    if kernels_wanted(problem, settings):
        if layer.hip_state.device is None:
            return None  # the kernels have not served this cache so far: the interface says why
        keys, values = cache.update(key, value, module.layer_idx)
        problem = replace(problem, k=keys, v=values)
    else:
        rows = buffered_rows(problem, settings, layer.hip_state)
        if rows is None:
            return None
        cache.append(key, value, module.layer_idx)
    try:
        if rows is None:
            result = attend(problem, settings, module.layer_idx, layer.hip_state)
        else:
            out = query.new_empty(*query.shape[:3], value.shape[-1])
            result = attend_next(problem, rows, zip(key, value, strict=True), out, None)
    except BaseException as error:
        cache.spoil(error)
        raise
    module.__dict__["_hip_call"] = Call.of(settings, result, "pages", unmasked)
    return result.out.transpose(1, 2)
