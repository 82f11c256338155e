"""Cache layers of Transformers that carry a `DecodeState` along, so that it follows what happens to the cache.

They replace the ordinary full-attention layers of dynamic and static caches and behave exactly as those do; the
state is only used when `hip` attends. Versions of Transformers without the layer mapping run stateless.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer

from hip_hf.state import DecodeState

# The attribute of the returned keys by which attention finds the state of their cache layer.
STATE = "_hip_state"


class _Stateful:
    """Mixin: a cache layer with a `DecodeState`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hip_state = DecodeState()

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            setattr(keys, STATE, self.hip_state)
        return keys, values

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.hip_state.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.hip_state.reorder(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.hip_state.crop(int(self.get_seq_length()))  # type: ignore[attr-defined]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.hip_state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.hip_state.reorder(indices)


class HiPDynamicLayer(_Stateful, DynamicLayer):
    """A growing full-attention cache layer with decode state."""


class HiPStaticLayer(_Stateful, StaticLayer):
    """A preallocated full-attention cache layer with decode state."""


def state_of(keys: torch.Tensor) -> DecodeState | None:
    """The decode state of the cache layer that returned `keys`, if it has one."""
    return getattr(keys, STATE, None)


def cache_kind(keys: torch.Tensor, rows: int) -> str:
    """How `explain` names the cache behind `keys`."""
    if state_of(keys) is not None:
        return "kept state"
    return "none" if keys.shape[2] == rows else "stateless"


def install() -> None:
    """Let caches made from a model's config use the layers above."""
    layers = (
        ("DYNAMIC_LAYER_TYPE_MAPPING", DynamicLayer, HiPDynamicLayer),
        ("STATIC_LAYER_TYPE_MAPPING", StaticLayer, HiPStaticLayer),
    )
    for name, plain, ours in layers:
        mapping = getattr(cache_utils, name, None)
        if mapping is not None and mapping.get("full_attention") is plain:
            mapping["full_attention"] = ours
