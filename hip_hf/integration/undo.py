"""A call that fails leaves the cache as it was.

A layer appends its new tokens to the cache before it asks for attention. Where attention then refuses, or fails, they are taken
back, from this layer and from those before it. The cache is not among the arguments of attention: on this path, and on no
other, it is looked up in the layer's own forward, which has it as a variable.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hip_hf.integration.cache_layers import HiPStaticLayer
from hip_hf.integration.settings import layer_index

# Placeholders of layers that reuse the keys of others, in the versions of Transformers that have them.
_HOLD_NOTHING: Any = getattr(cache_utils, "DummyLayer", ())


def unfinished(what: str) -> ValueError:
    """The error of going on with a cache that an interrupted call has left behind: outside of attention and of the cache's own
    methods, nobody can take back what it had appended."""
    return ValueError(f"past_key_values: got a cache {what}, as an interrupted call left it, allowed: a new one")


def leaving_the_cache(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `attention(module, query, key, value, ...)` of a layer."""

    @functools.wraps(attention)
    def called(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph holds no failures
            return attention(module, query, key, value, *args, **kwargs)
        try:
            return attention(module, query, key, value, *args, **kwargs)
        except BaseException as error:
            cache = _cache_of(module)
            if cache is not None:
                # a layer that reuses the keys of an earlier one may get the last rows only (Gemma 4)
                positions = kwargs.get("position_ids")
                rows = query.shape[2] if positions is None else positions.shape[-1]
                take_back(cache, rows, layer_index(module), (key, value), error)
            raise

    return called


def _cache_of(module: nn.Module) -> Cache | None:
    """The cache that the running forward of `module` appends to; None if it has none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is module:
            for value in frame.f_locals.values():
                if isinstance(value, Cache):
                    return getattr(value, "self_attention_cache", value)  # of an encoder-decoder model
        frame = frame.f_back
    return None


@contextlib.contextmanager
def all_or_none(cache: Cache, layer_idx: int, rows: int, *errors: type[BaseException]) -> Iterator[None]:
    """Around what appends `rows` tokens to a layer of a cache: where that raises one of `errors`, the layers before it give up
    their new tokens as well.

    Raises:
        ValueError: one of them has forgotten what it held before.
    """
    try:
        yield
    except errors as error:
        lengths: list[Any] = [getattr(layer, "get_seq_length", lambda: None)() for layer in cache.layers]
        if lengths[layer_idx] is not None and lengths[layer_idx] + rows in lengths[:layer_idx]:
            take_back(cache, rows, layer_idx, None, error)
        raise


def take_back(
    cache: Cache, rows: int, failed: int | None, tensors: tuple[torch.Tensor, torch.Tensor] | None, error: BaseException
) -> None:
    """Take the last `rows` tokens from the layers that have got them already. `failed`: the layer whose attention raised
    `error`, `tensors`: the keys and values `[B, Hkv, Tk, D]` that it was called with, if it came to that.

    Raises:
        ValueError: a layer has forgotten what it held before. Nothing has changed.
    """
    lengths = [int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else None for layer in cache.layers]
    kept = max((length for length in lengths if length is not None), default=0) - rows
    if kept < 0:
        return
    undo: list[Callable[[], None]] = []
    for index, (layer, length) in enumerate(zip(cache.layers, lengths, strict=True)):
        if isinstance(layer, _HOLD_NOTHING):
            continue
        if length is None and failed is not None and index >= failed:
            continue  # a layer that keeps a running state, whose turn had not come
        if length is None or length > kept:
            one = _undo(layer, kept, rows, tensors if index == failed else None)
            if one is None and not isinstance(error, Exception):
                return  # an interrupt stays one: the next call on the cache says what this one left behind
            if one is None:
                what = f"got one whose layer {index} ({type(layer).__name__}) cannot give up the tokens of the call that failed"
                raise ValueError(f"{error}; past_key_values: {what}, allowed: a new one") from error
            undo.append(one)
    for one in undo:
        one()


def _undo(layer: Any, kept: int, rows: int, tensors: tuple[torch.Tensor, torch.Tensor] | None) -> Callable[[], None] | None:
    """What brings a layer back to its first `kept` tokens, or None if nothing can. `tensors`: all that attention was given,
    where it is known."""

    def dynamic(keys: Any, values: Any) -> None:
        layer.keys, layer.values = (keys[:, :, :-rows], values[:, :, :-rows]) if kept else (None, None)
        layer.is_initialized = kept > 0
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = kept

    def static() -> None:
        layer.cumulative_length.sub_(rows)
        layer.is_initialized = kept > 0  # else it was made for the batch of the call that failed
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = kept
        if hasattr(layer, "hip_state"):
            layer.hip_state.crop(kept)

    def rolled() -> None:
        """The oldest slot is lost, but its token is out of sight of the next."""
        for x in (layer.keys, layer.values):
            x.copy_(x.roll(1, dims=2))
        layer.cumulative_length_int = kept

    if getattr(layer, "kind", "") == "paged":  # one with a running state beside its pages cannot go back
        return functools.partial(layer.truncate, kept) if kept else layer.reset
    if type(layer) is DynamicLayer:
        return functools.partial(dynamic, layer.keys, layer.values)
    if isinstance(layer, DynamicIndexedLayer):
        return functools.partial(layer.crop, -rows) if kept else layer.reset
    if type(layer) is DynamicSlidingWindowLayer:
        keys: Any
        for keys, values in ((layer.keys, layer.values), tensors or (layer.keys, layer.values)):
            if not kept or keys.shape[2] - rows >= min(kept, layer.sliding_window - 1):
                return functools.partial(dynamic, keys, values)
    if type(layer) in (StaticLayer, HiPStaticLayer):
        return static
    if type(layer) is StaticSlidingWindowLayer and kept + rows <= layer.max_cache_len:
        return static
    if type(layer) is StaticSlidingWindowLayer and kept >= layer.max_cache_len and rows == 1:
        return rolled
    return None
