"""`patch` and `unpatch`; which families have a patcher; and patching by itself, where settings ask for what only that gives."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hip_hf.config import HiPConfig
from hip_hf.integration.positions import extends
from hip_hf.integration.settings import attends_by_us, configure, text_config

if TYPE_CHECKING:
    from hip_hf.patches.base import Patcher

# model type -> the module whose `PATCHERS` has it, or a patcher that was added
_FAMILIES: dict[str, Any] = {
    "llama": "hip_hf.patches.llama",
    "mistral": "hip_hf.patches.mistral",
    "qwen2": "hip_hf.patches.qwen",
    "qwen2_moe": "hip_hf.patches.qwen",
    "qwen3": "hip_hf.patches.qwen",
    "qwen3_moe": "hip_hf.patches.qwen",
}
# In a patched model's `__dict__`: what `unpatch` puts back besides the forwards.
BEFORE = "_hip_before"


@dataclass(frozen=True)
class Before:
    """The model's attention name and settings (`config.hip`, None if there were none) before `patch`."""

    implementation: str | None
    settings: dict[str, Any] | None


def families() -> list[str]:
    """Model types that have a patcher."""
    return list(_FAMILIES)


def patcher_for(model_type: str) -> Patcher | None:
    """The patcher of a family, None if it has none."""
    found = _FAMILIES.get(model_type)
    return importlib.import_module(found).PATCHERS[model_type] if isinstance(found, str) else found


def add_patcher(model_type: str, patcher: Patcher) -> None:
    """Make a patcher of your own known, for this process (docs/patchers.md).

    Raises:
        ValueError: the family has one.
    """
    if model_type in _FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, allowed: one without a patcher ({' | '.join(_FAMILIES)} have one)")
    _FAMILIES[model_type] = patcher


def _layers(model: nn.Module) -> list[nn.Module]:
    """The attention layers that the model's family patches.

    Raises:
        ValueError: the family has no patcher, or the model has no such layers.
    """
    kind = text_config(model).model_type
    patcher = patcher_for(kind)
    if patcher is None:
        raise ValueError(
            f"model: got model type {kind!r}, allowed: {' | '.join(_FAMILIES)} (docs/patchers.md says how to write a patcher)"
        )
    layers = [module for module in model.modules() if type(module).__name__ == patcher.attention]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without {patcher.attention}, allowed: Transformers' own {kind}")
    return layers


def patch_layers(model: nn.Module) -> None:
    """Replace the forwards of the model's attention layers and nothing else. Raises ValueError as `patch` does."""
    from hip_hf.patches.base import patch_layer

    layers = _layers(model)
    patcher = patcher_for(text_config(model).model_type)
    assert patcher is not None
    for layer in layers:
        patch_layer(layer, patcher)


def patch(model: nn.Module, config: HiPConfig | None = None, **fields: Any) -> None:
    """Replace the attention forwards of a loaded model by ours; it attends by `hip` from then on.

    With `extend=None` logits are the same to the bit as with `attn_implementation="hip"`. Patching twice is harmless: forwards
    stay, settings are set anew. Weights, hooks, adapters and `state_dict` are not touched.

    Args:
        model: a Transformers model of one of the families in `hip_hf.patches.registry.families()`.
        config, fields: settings, as in `configure`.

    Raises:
        ValueError: a model of another family (the message lists those with a patcher), or settings that `configure` refuses.
            Nothing has changed then.
    """
    layers, target = _layers(model), text_config(model)
    before = Before(target._attn_implementation, getattr(target, "hip", None))
    if config is not None or fields:
        configure(model, config, **fields)
    if not attends_by_us(target):
        model.set_attn_implementation("hip")  # type: ignore[operator]
    patch_layers(model)
    for layer in layers:  # where `unpatch` finds it, whichever part of the model it is given
        layer.__dict__.setdefault(BEFORE, before)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: forwards, the attention's name and the settings are again as they were before. Harmless a second time."""
    from hip_hf.patches.base import unpatch_layer

    before = None
    for module in model.modules():
        before = module.__dict__.pop(BEFORE, before)
        unpatch_layer(module)
    if before is None:
        return
    target = text_config(model)
    if before.settings is None:
        target.__dict__.pop("hip", None)
    else:
        target.hip = before.settings
    if before.implementation is not None and target._attn_implementation != before.implementation:
        model.set_attn_implementation(before.implementation)  # type: ignore[operator]


def patch_if_extended(model: nn.Module) -> None:
    """Patch a model whose settings extend the context, if its family has a patcher. It may attend by us later on."""
    config = text_config(model)
    if config.model_type in _FAMILIES and extends(config):
        patch_layers(model)


def install() -> None:
    """Let models be patched as they are made, where their settings ask for it. Harmless when called again."""
    made = PreTrainedModel.post_init
    if made.__name__ == "hip_post_init":
        return

    def hip_post_init(self: Any) -> None:
        made(self)
        configs = [self.config, *(getattr(self.config, name, None) for name in self.config.sub_configs)]
        if any(getattr(config, "hip", None) is not None for config in configs):
            patch_if_extended(self)

    PreTrainedModel.post_init = hip_post_init  # type: ignore[method-assign]
