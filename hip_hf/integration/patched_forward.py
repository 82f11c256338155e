"""The forward of a patched attention layer: its family's `Patcher` says how the layer is put
together.

A patched layer hands q and k to `hip` before RoPE when the settings extend the context, and
otherwise does what the original does, to the bit. Nothing is read from the interface's tables in
between. Weights, submodules and parameters stay where they are; the only change to a layer is what
is called as its `forward` (and as its replica is made, for `nn.DataParallel`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import Cache

from hip_hf.integration.attention_function import attention_forward
from hip_hf.integration.continuous_batching import is_paged
from hip_hf.integration.decode_fast_path import next_token
from hip_hf.integration.extension import UNROTATED, extended, other_cache, positions_of
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.layer_attention import check_layer_call
from hip_hf.integration.patches.base import Patcher
from hip_hf.integration.settings import NAMES, layer_settings
from hip_hf.shown import refused

# Method of a module by which `nn.DataParallel` copies it.
REPLICATE = "_replicate_for_data_parallel"


@dataclass(eq=False)
class PatchedForward:
    """What stands for the forward of the layer `module`. `original`: the one that it had of its own
    (accelerate's, another patch), None if that was its class's.

    An object, since a bound method of the module comes back from a pickle as the class's own.
    """

    module: nn.Module
    patcher: Patcher
    original: Callable[..., Any] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return forward(self.module, self, *args, **kwargs)

    def replicate(self) -> Any:
        """A copy of the layer for another device, whose forward is of the copy."""
        replica: Any = type(self.module)._replicate_for_data_parallel(self.module)
        if self.module.__dict__.get("forward") is self:
            replica.__dict__["forward"] = replace(self, module=replica)
        return replica


def forward(
    self: Any,
    change: PatchedForward,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The forward of a patched attention layer: hidden states `[B, T, hidden size]` -> the same,
    and None. The cache is found among the other arguments by its type: its name is not the same in
    all versions of Transformers.

    Raises:
        ValueError: what `attention_forward` raises, or the cache's `update`.
    """
    name = self.config._attn_implementation or ""
    if name not in NAMES:
        call = change.original or MethodType(type(self).forward, self)
        return call(hidden_states, position_embeddings, attention_mask, *args, **kwargs)
    cache = cache_among((*args, *kwargs.values()))
    kwargs = {key: value for key, value in kwargs.items() if value is not cache}
    dropout = self.attention_dropout if self.training else 0.0
    check_layer_call(self, dropout, kwargs)
    sliding = change.patcher.sliding_window(self)
    unrotated = extended(self, sliding)
    if unrotated:
        _check_extended(self, cache, NAMES[name])
    query, key, value = change.patcher.project(self, hidden_states)
    if not unrotated:
        assert position_embeddings is not None
        rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *position_embeddings)
    setattr(key, UNROTATED, unrotated)
    if query.shape[2] == 1 and sliding is None and not self.training:
        settings = layer_settings(self, NAMES[name])
        step = next_token(self, query, key, value, attention_mask, cache, settings, unrotated)
        if step is not None:
            return self.o_proj(step.reshape(*hidden_states.shape[:-1], -1)), None
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    kwargs |= dict(dropout=dropout, scaling=self.scaling, sliding_window=sliding)
    kwargs |= dict(method=NAMES[name], unrotated=unrotated)
    out, _ = attention_forward(self, query, key, value, attention_mask, **kwargs)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), None


def _check_extended(module: Any, cache: Any, method: str | None) -> None:
    """Raise ValueError, before anything is cached, for a cache that would mix keys with and without
    rotation unnoticed, and for a layer that cannot extend the context."""
    if cache is not None and not isinstance(cache, HiPCache) and not is_paged(cache):
        raise other_cache(f"a {type(cache).__name__}", module.config.hip["extend"])
    if not torch.compiler.is_compiling():  # in a graph, attention itself looks at the layer
        positions_of(module, layer_settings(module, method))


def cache_among(values: Iterable[Any]) -> Any:
    """The cache among the arguments of a layer, None if it has none.

    Raises:
        ValueError: something that looks like a cache, and is none of Transformers' own.
    """
    for value in values:
        if isinstance(value, Cache) or is_paged(value):
            return value
        if hasattr(value, "get_seq_length"):
            raise refused("cache", type(value).__name__, "a subclass of transformers.Cache")
    return None


def _slot(module: nn.Module) -> str:
    """Where the layer's own forward is called from: a hook of accelerate keeps it aside."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def patched(module: nn.Module) -> PatchedForward | None:
    """What a layer's forward is replaced by; None if it is not."""
    change = module.__dict__.get(_slot(module))
    return change if isinstance(change, PatchedForward) else None


# All patched layers, for `hip_hf.unregister`.
_patched: WeakSet[nn.Module] = WeakSet()


def patch_layers(layers: list[tuple[nn.Module, Patcher]]) -> None:
    """Replace the forwards of attention layers, and nothing else. Harmless when called again."""
    for module, patcher in layers:
        if patched(module) is not None:
            continue
        slot = _slot(module)
        own = module.__dict__.get(slot)
        if isinstance(own, MethodType) and own.__func__ is type(module).forward:
            own = None  # accelerate's copy of the class's own
        module.__dict__[slot] = change = PatchedForward(module, patcher, own)
        module.__dict__[REPLICATE] = change.replicate
        _patched.add(module)


def unpatch_all() -> None:
    """Give every layer of this process that is patched the forward back that it had."""
    for module in list(_patched):
        unpatch_layer(module)


def unpatch_layer(module: nn.Module) -> bool:
    """Give one attention layer back the forward it had. Harmless where nothing was patched; whether
    something was."""
    change = patched(module)
    if change is None:
        return False
    slot, own = _slot(module), change.original
    if own is None and slot == "_old_forward":
        own = MethodType(type(module).forward, module)
    if own is None:
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = own
    module.__dict__.pop(REPLICATE, None)
    _patched.discard(module)
    return True
