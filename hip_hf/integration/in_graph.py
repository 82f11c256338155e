"""A layer's attention in a graph of `torch.compile`: one operator, which does at run time what attention does without a graph.

A graph can follow tensors and constants, but neither a selection nor the state that is kept beside a cache. Layers and states are
therefore known by numbers. A layer's number is a constant of its graph; that of a state comes in a tensor of the host, so that a
graph serves every cache of its shape.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import torch
from torch import nn

from hip_hf.integration.cache import NUMBER, STATE
from hip_hf.integration.settings import layer_index
from hip_hf.paged import PagedTensor
from hip_hf.problem import exporting
from hip_hf.state import numbered_state

_count = itertools.count()
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

# The operator reads the mask on the host: a CUDA graph must be made of what is before and behind it. PyTorch 2.6 has no such tag,
# and its compiler takes no layer for a constant: graphs break at attention there.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


class _Forward(threading.local):
    """What the layers of a forward share: the spans that their masks stand for, so that the host waits for these once.

    A graph gives each layer tensors of its own, in memory that later forwards use again: masks are known by their memory, and a
    forward begins with a layer that is of another model, or not behind the last one.
    """

    def __init__(self) -> None:
        self.config: Any = None
        self.last: int | None = None
        self.spans: dict[tuple[Any, ...], dict[int, Any]] = {}

    def spans_of(self, module: nn.Module, mask: torch.Tensor) -> dict[int, Any]:
        """By number of query rows, for `mask_spans` to read and to add to."""
        layer = layer_index(module)
        goes_on = self.config is module.config and layer is not None and self.last is not None and self.last < layer
        self.config, self.last = module.config, layer
        if not goes_on:
            self.spans = {}
        return self.spans.setdefault((mask.data_ptr(), mask.dtype, mask.shape, mask.stride()), {})


_forward = _Forward()


# Dynamo calls the function, and the answer is a constant of the graph, guarded by the layer's identity.
@torch.compiler.assume_constant_result
def number_of(module: nn.Module) -> int:
    """The number by which graphs know a layer."""
    if module not in _numbers:
        _numbers[module] = number = next(_count)
        _layers[number] = module
    return _numbers[module]


def serves(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a call is part of a graph that `torch.compile` makes, and the operator can stand for it: nobody asks for gradients,
    and the keys `[B, Hkv, Tk, D]` are an ordinary tensor."""
    if not torch.compiler.is_compiling() or exporting() or isinstance(key, PagedTensor) or not _TAGS:
        return False
    return not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    is_causal: bool | None,
    method: str | None,
    unrotated: bool,
) -> torch.Tensor:
    """What `attention_forward` of `interface.py`, whose arguments these are, adds to a graph: `[B, Tq, Hq, Dv]`."""
    ours = mask is not None and hasattr(mask, "_hip_window")
    if ours:
        sliding_window = mask._hip_window  # type: ignore[union-attr]
    unmasked = mask._hip_unmasked if ours else None  # type: ignore[union-attr]
    state = getattr(key, NUMBER, None)
    rest = (scale, sliding_window, softcap, is_causal, method, unrotated, unmasked)
    return layer(query, key, value, mask, sinks, state, number_of(module), *rest)


@torch.library.custom_op("hip_hf::layer", mutates_args=(), **_TAGS)
def layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    state: torch.Tensor | None,
    number: int,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    method: str | None,
    unrotated: bool,
    unmasked: int | None,
) -> torch.Tensor:
    """Attention of the layer with this `number`: `[B, Tq, Hq, Dv]`. `state`: int64, the number of its cache's state, on the host.
    `unmasked`: of a mask of ours what it says (`masks.py`), else None."""
    from hip_hf.integration.interface import attend_layer

    # other objects: what is attached to them, and worked out from it, is of this call, though a graph may use tensors again
    key = key.view_as(key)
    if state is not None:
        setattr(key, STATE, numbered_state(state))
    if mask is not None:
        mask = mask.view_as(mask)
        if unmasked is not None:
            mask._hip_window, mask._hip_unmasked = sliding_window, unmasked  # type: ignore[attr-defined]
            mask._hip_spans = _forward.spans_of(_layers[number], mask)  # type: ignore[attr-defined]
    fields: dict[str, Any] = dict(scaling=scale, sliding_window=sliding_window, softcap=softcap, s_aux=sinks, is_causal=is_causal)
    return attend_layer(_layers[number], query, key, value, mask, **fields, method=method, unrotated=unrotated)[0]


@layer.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])
