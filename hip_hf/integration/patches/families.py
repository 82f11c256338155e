"""Which families of models have a patcher, and which layers of a model it is for."""

from __future__ import annotations

from torch import nn

from hip_hf.integration.patches import llama, mistral, qwen
from hip_hf.integration.patches.base import Patcher
from hip_hf.integration.settings import text_config
from hip_hf.shown import refused

# by model type
_FAMILIES: dict[str, Patcher] = {**llama.PATCHERS, **mistral.PATCHERS, **qwen.PATCHERS}


def families() -> list[str]:
    """Model types that have a patcher."""
    return list(_FAMILIES)


def patcher_for(model_type: str) -> Patcher | None:
    """The patcher of a family, None if it has none."""
    return _FAMILIES.get(model_type)


def add_patcher(model_type: str, patcher: Patcher) -> None:
    """Make a patcher of your own known, for this process (docs/patchers.md).

    Raises:
        ValueError: the family has one.
    """
    if model_type in _FAMILIES:
        allowed = f"one without a patcher ({' | '.join(_FAMILIES)} have one)"
        raise refused("model_type", repr(model_type), allowed)
    _FAMILIES[model_type] = patcher


def layers_of(model: nn.Module) -> list[tuple[nn.Module, Patcher]]:
    """The attention layers of the model, with the patcher of its family.

    Raises:
        ValueError: the family has no patcher, or the model has no such layers.
    """
    kind = text_config(model).model_type
    patcher = patcher_for(kind)
    if patcher is None:
        allowed = f"{' | '.join(_FAMILIES)} (docs/patchers.md says how to write a patcher)"
        raise refused("model", f"model type {kind!r}", allowed)
    layers = [module for module in model.modules() if type(module).__name__ == patcher.attention]
    if not layers:
        got = f"{type(model).__name__} without {patcher.attention}"
        raise refused("model", got, f"Transformers' own {kind}")
    return [(layer, patcher) for layer in layers]


def layers_to_extend(model: nn.Module) -> list[tuple[nn.Module, Patcher]]:
    """`layers_of` for settings that extend the context, none where the family has no patcher. The
    model may attend by `hip` later on."""
    return layers_of(model) if text_config(model).model_type in _FAMILIES else []
