"""`patch` and `unpatch`; which families have a patcher; and patching by itself, where settings ask for what only that gives."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hip_hf.config import HiPConfig
from hip_hf.integration.changes import set_attribute
from hip_hf.integration.extension import extends
from hip_hf.integration.reach import check_heads, check_reach
from hip_hf.integration.settings import attends_by_us, configure, text_config, text_part

if TYPE_CHECKING:
    from hip_hf.integration.patches.base import Patcher

# model type -> the module whose `PATCHERS` has it, or a patcher that was added
_FAMILIES: dict[str, Any] = {
    "llama": "hip_hf.integration.patches.llama",
    "mistral": "hip_hf.integration.patches.mistral",
    "qwen2": "hip_hf.integration.patches.qwen",
    "qwen2_moe": "hip_hf.integration.patches.qwen",
    "qwen3": "hip_hf.integration.patches.qwen",
    "qwen3_moe": "hip_hf.integration.patches.qwen",
}
# In a patched model's `__dict__`: what `unpatch` puts back besides the forwards.
BEFORE = "_hip_before"


@dataclass(frozen=True)
class Before:
    """The attention's name and the settings (`config.hip`, None if there were none) of the model's text part before `patch`."""

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


def _layers(model: nn.Module) -> list[tuple[nn.Module, Patcher]]:
    """The attention layers of the model, with the patcher of its family.

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
    return [(layer, patcher) for layer in layers]


def patch_layers(layers: list[tuple[nn.Module, Patcher]]) -> None:
    """Replace the forwards of attention layers, and nothing else."""
    from hip_hf.integration.patches.base import patch_layer

    for layer, patcher in layers:
        patch_layer(layer, patcher)


def set_attention(model: nn.Module, name: str) -> None:
    """Let the model's text part, and no other part of it, attend by `name`."""
    target = text_config(model)
    if target._attn_implementation == name:
        return
    model.set_attn_implementation({text_part(model): name})  # type: ignore[operator]


def patch(model: nn.Module, config: HiPConfig | None = None, **fields: Any) -> None:
    """Replace the attention forwards of a loaded model by ours; it attends by `hip` from then on.

    With `extend=None` logits are the same to the bit as with `attn_implementation="hip"`. Patching twice is harmless: forwards
    stay, settings are set anew. Weights, hooks, adapters and `state_dict` are not touched, nor are parts besides the text's.

    Args:
        model: a Transformers model of one of the families in `hip_hf.integration.patches.registry.families()`.
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
        set_attention(model, "hip")
    patch_layers(layers)
    for layer, _ in layers:  # where `unpatch` finds it, whichever part of the model it is given
        layer.__dict__.setdefault(BEFORE, before)


def unpatch(model: nn.Module) -> None:
    """Give a model its own forwards back, whether `patch`, `configure(extend=...)` or its loading replaced them. The attention's
    name and the settings are again as they were before `patch`, but for `extend`, which is None then: what extended the
    context was the patch. Harmless a second time, and for a model that is not patched."""
    from hip_hf.integration.patches.base import unpatch_layer

    before, patched = None, False
    for module in model.modules():
        before = module.__dict__.pop(BEFORE, before)
        patched |= unpatch_layer(module)
    if before is None and not patched:
        return
    target = text_config(model)
    settings = getattr(target, "hip", None) if before is None else before.settings
    if settings is None:
        target.__dict__.pop("hip", None)
    else:
        target.hip = {**settings, "extend": None} if settings.get("extend") is not None else settings
    if before is not None and before.implementation is not None:
        set_attention(model, before.implementation)


def layers_to_extend(model: nn.Module) -> list[tuple[nn.Module, Patcher]]:
    """The layers to patch for settings that extend the context, none where the family has no patcher. The model may attend by
    us later on.

    Raises:
        ValueError: the model has not the layers of its family.
    """
    return _layers(model) if text_config(model).model_type in _FAMILIES else []


def install() -> None:
    """Let models be looked at as they are made: refused where they would ignore us, patched where their settings ask for it.
    Harmless when called again."""
    made = PreTrainedModel.post_init
    if made.__name__ == "hip_post_init":
        return

    def hip_post_init(self: Any) -> None:
        made(self)
        configs = [self.config, *(getattr(self.config, name, None) for name in self.config.sub_configs)]
        if any(attends_by_us(config) for config in configs):
            check_reach(self, text_config(self)._attn_implementation)
            check_heads(self, text_config(self)._attn_implementation)
        if any(getattr(config, "hip", None) is not None for config in configs) and extends(text_config(self)):
            patch_layers(layers_to_extend(self))

    set_attribute(PreTrainedModel, "post_init", hip_post_init)
