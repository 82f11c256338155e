"""How caches of Transformers carry a `DecodeState` along, so that it follows what happens to the
cache.

The dynamic cache of a model that attends by `hip` is a `HiPCache`; the full-attention layers of a
static cache get a state beside them and behave exactly as before.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionAndStaticFullAttentionLayer, StaticLayer

from hip_hf.cache.pages import PagedTensor
from hip_hf.shown import refused
from hip_hf.state import DecodeState

# Model types whose layers make the keys of attention out of what the cache returns, by a function
# of each cached token alone: latent vectors are expanded (DeepSeek), heads are repeated (JetMoE).
# The state still follows the cache.
REBUILT = {"axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "jetmoe"}
REBUILT |= {"kimi_linear", "longcat_flash", "minicpm3", "youtu"}
# Attributes of the returned keys, by which attention finds the state of their cache layer,
# `explain` its kind, and whether gradients were asked for through what is cached.
STATE, KIND, CUT_OFF = "_hip_state", "_hip_kind", "_hip_cut_off"
# And the `HiPCache` that returned them, to be told where the call fails.
CACHE = "_hip_cache"
# The same for a graph of `torch.compile`, which knows a state by its number.
NUMBER = "_hip_number"


# Of each thread: `state` of the layer of a cache that was updated last, until attention has asked
# for it; and a weak reference to the `HiPCache` that was updated last.
newest = threading.local()


class Stateful:
    """Mixin: a cache layer with a `DecodeState`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hip_state = DecodeState()

    def stated(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the keys `[B, Hkv, T, D]` with the state attached."""
        setattr(keys, STATE, self.hip_state)
        if torch.compiler.is_compiling():
            setattr(keys, NUMBER, self.hip_state.number)
        else:
            newest.state = self.hip_state
        return keys

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append as the layer itself does. Returns all keys, with the state attached, and all
        values, `[B, Hkv, T, D]` each."""
        keys, values = super().update(*args, **kwargs)  # type: ignore[misc]
        return self.stated(keys), values

    def reset(self) -> None:
        """Empty the layer and its state."""
        super().reset()  # type: ignore[misc]
        self.hip_state.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let batch row `b` of the layer and of its state continue what row `beam_idx[b]` was."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.hip_state.reorder(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Shorten the layer as it does itself, and its state to what is left."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.hip_state.crop(int(self.get_seq_length()))  # type: ignore[attr-defined]


class HiPStaticLayer(Stateful, StaticLayer):
    """A preallocated full-attention cache layer with decode state."""


class HiPHybridStaticLayer(  # type: ignore[misc, override]
    Stateful, LinearAttentionAndStaticFullAttentionLayer
):
    """The same with the running state of linear attention or of a convolution beside it."""


def forget_newest() -> None:
    """Forget which cache layer was updated last, as a forward of a model begins. A model before it
    that does not attend by hip_hf has left its own there."""
    newest.__dict__.clear()


def state_of(keys: torch.Tensor, model_type: str) -> DecodeState | None:
    """Return the decode state, if any, of the cache layer that returned `keys` `[B, Hkv, T, D]`, or
    what they were made of."""
    state = newest.__dict__.pop("state", None)
    return getattr(keys, STATE, state if model_type in REBUILT else None)


def unusable(what: str) -> ValueError:
    """The error of going on with a cache that a call has left with a part of its tokens."""
    allowed = "`reset()` before it is used again, or a new one"
    return refused("past_key_values", f"a cache {what}", allowed)


def spoil(keys: torch.Tensor, model_type: str, error: BaseException) -> None:
    """Tell the `HiPCache` that returned `keys` `[B, Hkv, T, D]`, or what they were made of, if one
    did, that attention to them has failed with `error`."""
    cache: Any = getattr(keys, CACHE, None)
    if cache is None and model_type in REBUILT:
        cache = getattr(newest, "cache", lambda: None)()
        if cache is not None and cache.get_seq_length() != keys.shape[2]:  # of another call
            return
    if cache is not None:
        cache.spoil(error)


def cache_kind(keys: torch.Tensor, state: DecodeState | None, rows: int) -> str:
    """Return how `explain` names the cache behind the `keys` `[B, Hkv, T, D]` of a call of `rows`
    query rows."""
    if isinstance(keys, PagedTensor):
        return "pages"
    if state is not None:
        return getattr(keys, KIND, "kept state")
    return "none" if keys.shape[2] == rows else "stateless"


@torch.compiler.disable
def outside_of_graphs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in whose place a graph of `torch.compile` breaks, rather than wherever in it
    Dynamo cannot go on."""
    return function(*args, **kwargs)


class _CutOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tie):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        got = "a backward pass through attention to cached tokens"
        got += ", which are kept without their gradients"
        raise refused("HiPCache", got, "through a call that brings all tokens")


_warned = False


def cut_off(x: torch.Tensor) -> torch.Tensor:
    """Return `x` (of any shape), which was computed from cached tokens where gradients are asked
    for. A backward pass through it raises an error, rather than leave out what goes through the
    cache. Warns once."""
    global _warned
    if not _warned:
        _warned = True
        text = "hip: a HiPCache keeps tokens without their gradients, so a backward pass through"
        text += " this call would raise. torch.no_grad() around it saves its memory."
        warnings.warn(text, stacklevel=2)
    return _CutOff.apply(x, torch.zeros((), requires_grad=True, device=x.device))
