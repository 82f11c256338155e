"""A decode step of one layer in a graph of `torch.compile`, as a CUDA graph can hold it: nothing is decided on the host.

The rest of what a graph holds (`in_graph.py`) looks at the mask on the host, and at the state, to find out what to launch. With a
static cache and the kernels nothing of that changes from step to step: where sequences begin and end is worked out on the device,
which also knows how old its selections are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hip_hf.attention import dense_reason
from hip_hf.backends.choice import kernels_serve
from hip_hf.geometry import Span
from hip_hf.integration.cache_layers import NUMBER, STATE
from hip_hf.integration.masks import LAST
from hip_hf.integration.settings import layer_index, layer_settings
from hip_hf.problem import AttentionProblem


def table_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences of a mask of ours, int32 `[B, 1, 1, Tk]`, in a call of one query row each: a table as in
    `triton/common/sequences.py`, and `[B]` whether padding makes a hole, which no table can say. Tensor operations only."""
    places = mask[:, 0, 0]
    real = places <= LAST  # what is beyond the query is in nobody's sight; padding is as well
    slots = torch.arange(places.shape[1], dtype=torch.int32, device=mask.device)
    first = torch.where(real, slots, places.shape[1]).amin(-1)
    last = torch.where(real, slots, -1).amax(-1)
    keys = real.sum(-1, dtype=torch.int32)
    batch = torch.arange(len(mask), dtype=torch.int32, device=mask.device)
    table = torch.stack([batch, first, torch.zeros_like(batch), keys.clamp(max=1), keys - 1]).to(torch.int32)
    return table, (keys > 0) & (last + 1 - first != keys)


# Dynamo calls the function when it makes a graph, which is guarded by the layer's identity and by the other arguments.
@torch.compiler.assume_constant_result
def _way(
    module: nn.Module,
    method: str | None,
    raw: Mapping[str, Any] | None,
    heads: tuple[int, int],
    dims: tuple[int, int],
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
    rest: tuple[float, int | None, float | None],
) -> tuple[str, bool]:
    """The layer's settings, as text, and whether they are dense for all that a cache of `keys` slots can hold; no text where the
    kernels do not serve such a step.

    Args:
        raw: the settings in the model's config, for the graph to be guarded by.
        heads: of queries and of keys. dims: of keys and of values. rest: scale, sliding window and softcap.
    """
    settings = layer_settings(module, method)
    shapes = (heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1])
    q, k, v = (torch.empty(1, count, 1, dim, dtype=dtype, device=device) for count, dim in shapes)
    problem = AttentionProblem(q, k, v, (Span(0, 0, keys, 0, 1, keys - 1),), *rest)
    dense = bool(dense_reason(problem, settings, layer_index(module), False)[0])
    known = dense or (settings.method == "hip" and settings.delta is None)
    if settings.extend is not None or not known or not kernels_serve(problem, settings, dense):
        return "", False
    return settings.text, dense


def step(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    method: str | None,
) -> torch.Tensor | None:
    """Attention of one query row a sequence, `[B, 1, Hq, Dv]`; NaN for a sequence with a hole. None where the host has to decide:
    the cache is not a static one, the kernels do not serve it, or have not done so with a prompt of its length so far."""
    if getattr(key, NUMBER, None) is None or query.shape[2] != 1 or mask.dtype != torch.int32:
        return None
    rest = (query.shape[3] ** -0.5 if scale is None else scale, sliding_window, softcap)
    heads, dims = (query.shape[1], key.shape[1]), (query.shape[3], value.shape[3])
    raw = getattr(module.config, "hip", None)
    text, dense = _way(module, method, raw, heads, dims, key.shape[2], query.dtype, query.device, rest)
    if not text:
        return None
    from hip_hf.backends.triton import ops  # which imports Triton

    if dense:
        table, holes = table_of(mask[..., : key.shape[2]])
        nothing = (None, None, None)
        out = ops.attend(query, key, value, sinks, table, *nothing, text, rest[0], softcap, sliding_window, 0)[0].transpose(1, 2)
    else:
        state = getattr(key, STATE).known(layer_index(module))
        if state is None or not state.stepping(text, len(query)):
            return None
        table, holes = table_of(mask[..., : key.shape[2]])
        kept = state.device.tensors()
        out = ops.decode_step(query, key, value, sinks, table, *kept, text, rest[0], softcap, sliding_window)
    return out.masked_fill(holes[:, None, None, None], torch.nan)
