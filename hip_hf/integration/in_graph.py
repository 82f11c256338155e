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

from hip_hf.cache.pages import PagedTensor
from hip_hf.integration.cache_layers import KIND, NUMBER, STATE
from hip_hf.integration.graph_step import step
from hip_hf.integration.layer_attention import attend_layer
from hip_hf.integration.settings import layer_index
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


# What is attached to a mask of ours, in the order of `masks.hip_mask`: its window, what it says of rows, and spans.
Said = tuple[int | None, int, dict[int, Any]] | None


# Dynamo calls the function, and the answer is a constant of the graph, guarded by the layer's identity.
@torch.compiler.assume_constant_result
def number_of(module: nn.Module) -> int:
    """The number by which graphs know a layer."""
    if module not in _numbers:
        _numbers[module] = number = next(_count)
        _layers[number] = module
    return _numbers[module]


def serves(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a call is part of a graph that `torch.compile` makes, and the operator can stand for it: the keys `[B, Hkv, Tk, D]`
    are an ordinary tensor, and nobody asks for gradients through a cache."""
    if not torch.compiler.is_compiling() or exporting() or isinstance(key, PagedTensor) or not _TAGS:
        return False
    if hasattr(key, KIND):  # of a `HiPCache`, which tells a graph of no number
        return False
    return not (getattr(key, NUMBER, None) is not None and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))


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
    """What `attention_forward` of `attention_function.py`, whose arguments these are, adds to a graph: `[B, Tq, Hq, Dv]`."""
    ours = mask is not None and hasattr(mask, "_hip_window")
    if ours:
        sliding_window = mask._hip_window  # type: ignore[union-attr]
    unmasked = mask._hip_unmasked if ours else None  # type: ignore[union-attr]
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, sinks))
    if ours and is_causal and not unrotated and not learning:
        out = step(module, query, key, value, mask, sinks, scale, sliding_window, softcap, method)  # type: ignore[arg-type]
        if out is not None:
            return out
    state = getattr(key, NUMBER, None)
    rest = (scale, sliding_window, softcap, is_causal, method, unrotated, unmasked)
    return layer(query, key, value, mask, sinks, state, learning, number_of(module), *rest)


@torch.library.custom_op("hip_hf::layer", mutates_args=(), **_TAGS)
def layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    state: torch.Tensor | None,
    learning: bool,
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
    `learning`: gradients will be asked for. `unmasked`: of a mask of ours what it says (`masks.py`), else None."""
    # another object: what is attached to it is of this call, though a graph may use tensors again
    key = key.view_as(key)
    if state is not None:
        setattr(key, STATE, numbered_state(state))
    said: Said = None
    if mask is not None and unmasked is not None:
        said = sliding_window, unmasked, _forward.spans_of(_layers[number], mask)
    given = _given(query, key, value, sinks)
    rest = (scale, sliding_window, softcap, is_causal, method, unrotated)
    if learning:  # some methods go another way then, and the backward pass goes the same
        return _followed(number, given, mask, said, rest)[0].detach()
    return _attend(number, given, mask, said, rest)


def _given(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """What there is of query, key, value and sinks: what has gradients."""
    return [x for x in tensors if x is not None]


def _attend(number: int, given: list[torch.Tensor], mask: torch.Tensor | None, said: Said, rest: tuple[Any, ...]) -> torch.Tensor:
    """`layer` outside of a graph, of the tensors `_given`. `rest`: what `layer` is given from `scale` on, but for `unmasked`."""
    query, key, value, *sinks = given
    if mask is not None:
        mask = mask.view_as(mask)  # another object, as `key` is
        if said is not None:
            mask._hip_window, mask._hip_unmasked, mask._hip_spans = said  # type: ignore[attr-defined]
    scale, sliding_window, softcap, is_causal, method, unrotated = rest
    fields: dict[str, Any] = dict(scaling=scale, sliding_window=sliding_window, softcap=softcap, is_causal=is_causal)
    fields |= dict(s_aux=sinks[0] if sinks else None, method=method, unrotated=unrotated)
    return attend_layer(_layers[number], query, key, value, mask, **fields)[0]


def _followed(
    number: int, given: list[torch.Tensor], mask: torch.Tensor | None, said: Said, rest: tuple[Any, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`_attend`, followed by autograd, from which an operator's own computations are hidden otherwise; and the tensors as
    autograd knows them."""
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        followed = [x.detach().requires_grad_() for x in given]
        return _attend(number, followed, mask, said, rest), followed


@layer.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


@torch.library.custom_op("hip_hf::layer_backward", mutates_args=(), **_TAGS)
def layer_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    number: int,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    method: str | None,
    unrotated: bool,
    unmasked: int | None,
) -> list[torch.Tensor]:
    """Gradients of query, key, value and, where there are any, sinks, from that of what `layer` gave. This is computed once more:
    a graph could not keep what was selected."""
    said: Said = None if unmasked is None else (sliding_window, unmasked, {})
    rest = (scale, sliding_window, softcap, is_causal, method, unrotated)
    grads = torch.autograd.grad(*_followed(number, _given(query, key, value, sinks), mask, said, rest), grad)
    return [x.contiguous() for x in grads]  # in memory as the graph expects them


@layer_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in _given(query, key, value, sinks)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, mask, sinks, _, _, *ctx.rest = inputs  # without a state: `serves`
    ctx.save_for_backward(query, key, value, mask, sinks)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, mask, sinks = ctx.saved_tensors
    grads = layer_backward(grad, query, key, value, mask, sinks, *ctx.rest)
    return (*grads[:3], None, None if sinks is None else grads[3], None, None, *[None] * len(ctx.rest))


layer.register_autograd(_backward, setup_context=_save)
