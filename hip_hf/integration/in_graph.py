"""A layer's attention in a graph of `torch.compile`: one operator, which does at run time what
attention does without a graph.

A graph can follow tensors and constants, but neither a selection nor the state that is kept beside
a cache. Layers and states are therefore known by numbers. A layer's number is a constant of its
graph; that of a state comes in a tensor of the host, so that a graph serves every cache of its
shape.

The operator looks at the mask on the host, and at the state, to find out what to launch. With a
static cache and the kernels nothing of that changes from step to step: `step` decides nothing on
the host, so that a CUDA graph can hold it. Where sequences begin and end is worked out on the
device, which also knows how old its selections are.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hip_hf.attention import dense_reason
from hip_hf.backends.base import kind_of
from hip_hf.backends.choice import asks_for_kernels, kernels_serve
from hip_hf.cache.pages import PagedTensor
from hip_hf.geometry import Span
from hip_hf.integration.cache_layers import KIND, NUMBER, STATE
from hip_hf.integration.layer_attention import attend_layer
from hip_hf.integration.masks import keys_in_sight
from hip_hf.integration.settings import layer_index, layer_settings
from hip_hf.problem import AttentionProblem
from hip_hf.state import DecodeState, numbered_state

_count = itertools.count()
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

# The operator reads the mask on the host: a CUDA graph must be made of what is before and behind
# it. PyTorch 2.6 has no such tag, and its compiler takes no layer for a constant: graphs break at
# attention there.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}


class _Forward(threading.local):
    """What the layers of a forward share: the spans that their masks stand for, so that the host
    waits for these once.

    A graph gives each layer tensors of its own, in memory that later forwards use again: masks are
    known by their memory, and a forward begins with a layer that is of another model, or not behind
    the last one.
    """

    def __init__(self) -> None:
        self.config: Any = None
        self.last: int | None = None
        self.spans: dict[tuple[Any, ...], dict[int, Any]] = {}

    def spans_of(self, module: nn.Module, mask: torch.Tensor) -> dict[int, Any]:
        """By number of query rows, for `mask_spans` to read and to add to."""
        layer = layer_index(module)
        behind = layer is not None and self.last is not None and self.last < layer
        if not (behind and self.config is module.config):
            self.spans = {}
        self.config, self.last = module.config, layer
        return self.spans.setdefault((mask.data_ptr(), mask.dtype, mask.shape, mask.stride()), {})


_forward = _Forward()


# Dynamo calls the function: its answer is a constant of the graph, guarded by the layer's identity.
@torch.compiler.assume_constant_result
def number_of(module: nn.Module) -> int:
    """The number by which graphs know a layer."""
    if module not in _numbers:
        _numbers[module] = number = next(_count)
        _layers[number] = module
    return _numbers[module]


def serves(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the operator can stand for a call in a graph that `torch.compile` makes: the keys
    `[B, Hkv, Tk, D]` are an ordinary tensor, and nobody asks for gradients through a cache."""
    # a `HiPCache`, whose keys have a kind, tells a graph of no number
    if not _TAGS or isinstance(key, PagedTensor) or hasattr(key, KIND):
        return False
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return not (learning and getattr(key, NUMBER, None) is not None)


# What a call says besides its tensors: names of the arguments of `attend_layer`, and `unmasked`, of
# a position mask how many rows came without one for padding (`masks.py`), else None.
_SAID = dict(scaling="float?", sliding_window="SymInt?", softcap="float?", is_causal="bool?")
_SAID |= dict(method="str?", unrotated="bool?", unmasked="SymInt?")
# Arguments of both operators.
_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks"
_OTHERS = ", ".join(f"{kind} {name}" for name, kind in _SAID.items())
_LAYER = f"({_TENSORS}, Tensor? state, bool learning, SymInt number, {_OTHERS}) -> Tensor"
_LAYER_BACKWARD = f"(Tensor grad, {_TENSORS}, SymInt number, {_OTHERS}) -> Tensor[]"


def layer_in_graph(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **fields: Any,
) -> torch.Tensor:
    """What `attend_layer`, whose arguments these are, adds to a graph: `[B, Tq, Hq, Dv]`."""
    said: dict[str, Any] = {name: fields.get(name) for name in _SAID}
    if said["is_causal"] is None:
        said["is_causal"] = getattr(module, "is_causal", True)
    sinks = fields.get("s_aux")
    tensors = _given(query, key, value, sinks)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if mask is not None and hasattr(mask, "_hip_window"):
        made: Any = mask
        said |= dict(sliding_window=made._hip_window, unmasked=made._hip_unmasked)
        if said["is_causal"] and not said["unrotated"] and not learning:
            out = step(module, (query, key, value), mask, sinks, said)
            if out is not None:
                return out
    state = getattr(key, NUMBER, None)
    number = number_of(module)
    return layer(query, key, value, mask, sinks, state, learning, number, *said.values())


def table_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences of a position mask, int32 `[B, 1, 1, Tk]`, in a call of one query row each: a
    table as in `triton/common/sequences.py`, and `[B]` whether padding makes a hole, which no table
    can say. Tensor operations only."""
    keys, first, last = keys_in_sight(mask)
    batch = torch.arange(len(mask), dtype=torch.int32, device=mask.device)
    fields = [batch, first, torch.zeros_like(batch), keys.clamp(max=1), keys - 1]
    table = torch.stack(fields).to(torch.int32)
    return table, (keys > 0) & (last + 1 - first != keys)


# Dynamo calls the function when it makes a graph, which is guarded by the layer's identity and by
# the other arguments.
@torch.compiler.assume_constant_result
def _way(
    module: nn.Module,
    method: str | None,
    raw: Mapping[str, Any] | None,
    shapes: tuple[tuple[int, int], ...],
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
    rest: tuple[float, int | None, float | None],
) -> tuple[str, bool]:
    """The layer's settings, as text, and whether they are dense for all that a cache of `keys`
    slots can hold; no text where the kernels do not serve such a step. `raw`: the settings in the
    model's config, for the graph to be guarded by. `shapes`: heads and head dim of query, key and
    value. `rest`: scale, sliding window and softcap."""
    settings = layer_settings(module, method)
    if settings.extend is not None or not asks_for_kernels(settings, device):
        return "", False
    q, k, v = (torch.empty(1, heads, 1, dim, dtype=dtype, device=device) for heads, dim in shapes)
    problem = AttentionProblem(q, k, v, (Span(0, 0, keys, 0, 1, keys - 1),), *rest)
    dense = bool(dense_reason(problem, settings, layer_index(module), False)[0])
    selecting = settings.method == "hip" and kind_of(settings) == "block_sparse"
    if not (dense or selecting) or not kernels_serve(problem, settings, dense):
        return "", False
    return settings.text, dense


def step(
    module: nn.Module, given: tuple[torch.Tensor, ...], mask: Any, sinks: Any, said: dict[str, Any]
) -> torch.Tensor | None:
    """Attention of one query row a sequence, `[B, 1, Hq, Dv]`; NaN for a sequence with a hole.
    `given`: query, key and value. `said`: as `_SAID`. None where the host has to decide: the cache
    is not a static one, the kernels do not serve it, or have not so far with a prompt of its
    length."""
    query, key, _ = given
    if getattr(key, NUMBER, None) is None or query.shape[2] != 1 or mask.dtype != torch.int32:
        return None
    scale, sliding_window, softcap = said["scaling"], said["sliding_window"], said["softcap"]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    shapes = tuple((x.shape[1], x.shape[3]) for x in given)
    kind, rest = (key.shape[2], query.dtype, query.device), (scale, sliding_window, softcap)
    raw = getattr(module.config, "hip", None)
    text, dense = _way(module, said["method"], raw, shapes, *kind, rest)
    if not text:
        return None
    tables = None
    if not dense:
        state: DecodeState | None = getattr(key, STATE).known(layer_index(module))
        if state is None or not state.stepping(text, len(query)):
            return None
        tables = state.device
    from hip_hf.backends.triton import ops  # which imports Triton

    table, holes = table_of(mask[..., : key.shape[2]])
    called = (text, scale, softcap, sliding_window)
    if tables is None:
        out, *_ = ops.attend(*given, sinks, table, None, None, None, *called, 0)
        out = out.transpose(1, 2)
    else:
        out = ops.decode_step(*given, sinks, table, *tables.tensors(), *called)
    return out.masked_fill(holes[:, None, None, None], torch.nan)


@torch.library.custom_op("hip_hf::layer", mutates_args=(), schema=_LAYER, **_TAGS)
def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Attention of the layer with this `number`: `[B, Tq, Hq, Dv]`. `state`: int64, the number of
    its cache's state, on the host. `learning`: gradients will be asked for."""
    mask, sinks, state, learning, number, *said = rest
    # another object: what is attached to it is of this call, though a graph may use tensors again
    key = key.view_as(key)
    if state is not None:
        setattr(key, STATE, numbered_state(state))
    by_position = mask is not None and said[-1] is not None
    spans = _forward.spans_of(_layers[number], mask) if by_position else {}
    given = _given(query, key, value, sinks)
    if learning:  # some methods go another way then, and the backward pass goes the same
        return _followed(number, given, mask, spans, said)[0].detach()
    return _attend(number, given, mask, spans, said)


def _given(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """What there is of query, key, value and sinks: what has gradients."""
    return [x for x in tensors if x is not None]


def _attend(number: int, given: list[torch.Tensor], mask: Any, spans: Any, said: Any) -> Any:
    """`layer` outside of a graph, of the tensors `_given`. `spans`: what is known of the mask's."""
    query, key, value, *sinks = given
    fields = dict(zip(_SAID, said, strict=True), s_aux=sinks[0] if sinks else None)
    window, unmasked = fields["sliding_window"], fields.pop("unmasked")
    if mask is not None:
        mask = mask.view_as(mask)  # another object, as `key` is
        if unmasked is not None:
            mask._hip_window, mask._hip_unmasked, mask._hip_spans = window, unmasked, spans
    return attend_layer(_layers[number], query, key, value, mask, **fields)[0]


def _followed(number: int, given: list[torch.Tensor], *rest: Any) -> tuple[torch.Tensor, Any]:
    """`_attend`, followed by autograd, from which an operator's own computations are hidden
    otherwise; and the tensors as autograd knows them."""
    shown = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), shown:
        followed = [x.detach().requires_grad_() for x in given]
        return _attend(number, followed, *rest), followed


@layer.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


@torch.library.custom_op("hip_hf::layer_backward", mutates_args=(), schema=_LAYER_BACKWARD, **_TAGS)
def layer_backward(grad: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    """Gradients of query, key, value and, where there are any, sinks, from that of what `layer`
    gave. This is computed once more: a graph could not keep what was selected."""
    query, key, value, mask, sinks, number, *said = given
    out, followed = _followed(number, _given(query, key, value, sinks), mask, {}, said)
    # in memory as the graph expects them
    return [x.contiguous() for x in torch.autograd.grad(out, followed, grad)]


@layer_backward.register_fake
def _(grad: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in _given(*given[:3], given[4])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, mask, sinks, _, _, *ctx.rest = inputs  # without a state: `serves`
    ctx.save_for_backward(query, key, value, mask, sinks)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = layer_backward(grad, *ctx.saved_tensors, *ctx.rest)
    of_sinks = grads[3] if len(grads) > 3 else None
    return (*grads[:3], None, of_sinks, *[None] * (2 + len(ctx.rest)))


layer.register_autograd(_backward, setup_context=_save)
