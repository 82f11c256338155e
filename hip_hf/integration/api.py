"""The public functions that change Transformers or a model of it: `register`, `configure`, `patch`,
and what takes them back."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hip_hf.config import HiPConfig
from hip_hf.integration import changes, continuous_batching, hip_cache
from hip_hf.integration.attention_function import attention_forward
from hip_hf.integration.extension import check_extension, extends
from hip_hf.integration.masks import hip_mask
from hip_hf.integration.model_checks import check_class, check_layers, check_model
from hip_hf.integration.patched_forward import patch_layers, unpatch_all, unpatch_layer
from hip_hf.integration.patches.families import layers_of, layers_to_extend
from hip_hf.integration.settings import (
    NAMES,
    attends_by_us,
    read_settings,
    refused,
    text_config,
    text_part,
)

# In a patched layer's `__dict__`: what `unpatch` puts back besides the forwards, the attention's
# name and the settings (`config.hip` or None) of the model's text part before `patch`.
BEFORE = "_hip_before"


def register() -> None:
    """Make the names in `NAMES` known to Transformers. Importing `hip_hf` has done so already;
    calling it again is harmless."""
    for name, method in NAMES.items():
        AttentionInterface.register(name, functools.partial(attention_forward, method=method))
        AttentionMaskInterface.register(name, hip_mask)
        # Transformers has no public way to take a name back
        changes.at_undo(functools.partial(AttentionInterface._global_mapping.pop, name, None))
        changes.at_undo(functools.partial(AttentionMaskInterface._global_mapping.pop, name, None))
    hip_cache.install_caches()
    continuous_batching.open_gate()
    changes.wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _adjust)
    changes.wrap(PreTrainedModel, "set_attn_implementation", _set)
    changes.wrap(PreTrainedModel, "post_init", _post_init)


def _adjust(adjust: Any, self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what a model calls before its layers are made."""
    check_class(self, attn_implementation)
    return adjust(self, attn_implementation, *args, **kwargs)


def _set(change: Any, self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    """Around what sets a model's attention."""
    asked = attn_implementation
    if isinstance(asked, dict):
        asked = asked.get(text_part(self), asked.get(""))
    check_model(self, asked)
    change(self, attn_implementation, *args, **kwargs)


def _post_init(made: Any, self: Any) -> None:
    """Around what a model calls when its layers have been made."""
    made(self)
    parts = [getattr(self.config, name, None) for name in self.config.sub_configs]
    configs = [self.config, *parts]
    if any(attends_by_us(config) for config in configs):
        check_model(self, text_config(self)._attn_implementation)
    configured = any(getattr(config, "hip", None) is not None for config in configs)
    if configured and extends(text_config(self)):
        patch_layers(layers_to_extend(self))


def unregister() -> None:
    """Take back all that `hip_hf` has changed in Transformers and lm-eval, which then know no
    `hip`, and in layers of models.

    Models that attend by `hip` cannot be called until `register` is called again, and patched ones
    have their own forwards then (`patch` and `configure` replace them anew). What something else
    has put in the place of such a change stays there. Finders of `hip-hf autoload` that still wait
    for an import are removed, and `register` does not bring them back. Harmless a second time.
    """
    unpatch_all()
    changes.undo()


def configure(model: nn.Module, config: HiPConfig | None = None, **fields: Any) -> HiPConfig:
    """Set how a model attends; takes effect at its next call and is saved with its config.

    Args:
        model: a Transformers model; what the settings change is its `config.hip` (of the text
            config).
        config: replaces the present settings; None keeps them.
        fields: single fields of `HiPConfig`, merged over `config` or the present settings.

    Returns:
        The settings that now hold.

    Raises:
        ValueError: unknown or out-of-range fields, layers that the model does not have, or `extend`
            for a model that cannot. Nothing has changed then.
    """
    target = text_config(model)
    if config is not None and not isinstance(config, HiPConfig):
        raise refused("config", type(config).__name__, "HiPConfig or None")
    settings = read_settings(target) if config is None else config
    if fields:
        settings = HiPConfig.from_dict({**settings.to_dict(), **fields})
    check_layers(settings, target)
    check_extension(settings, target)
    patched = [] if settings.extend is None else layers_to_extend(model)
    target.hip = settings.to_dict()
    patch_layers(patched)
    return settings


def set_attention(model: nn.Module, name: str) -> None:
    """Let the model's text part, and no other part of it, attend by `name`."""
    target = text_config(model)
    if target._attn_implementation == name:
        return
    model.set_attn_implementation({text_part(model): name})  # type: ignore[operator]


def patch(model: nn.Module, config: HiPConfig | None = None, **fields: Any) -> None:
    """Replace the attention forwards of a loaded model; it attends by `hip` from then on.

    With `extend=None` logits are the same to the bit as with `attn_implementation="hip"`. Patching
    twice is harmless: forwards stay, settings are set anew. Weights, hooks, adapters and
    `state_dict` are not touched, nor are parts besides the text's.

    Args:
        model: a Transformers model of one of the families in
            `hip_hf.integration.patches.families.families()`.
        config, fields: settings, as in `configure`.

    Raises:
        ValueError: a model of another family (the message lists those with a patcher), or settings
            that `configure` refuses. Nothing has changed then.
    """
    layers, target = layers_of(model), text_config(model)
    before = target._attn_implementation, getattr(target, "hip", None)
    if config is not None or fields:
        configure(model, config, **fields)
    if not attends_by_us(target):
        set_attention(model, "hip")
    patch_layers(layers)
    for layer, _ in layers:  # where `unpatch` finds it, whichever part of the model it is given
        layer.__dict__.setdefault(BEFORE, before)


def unpatch(model: nn.Module) -> None:
    """Give a model its own forwards back, whether `patch`, `configure(extend=...)` or its loading
    replaced them. The attention's name and the settings are again as they were before `patch`, but
    for `extend`, which is None then: what extended the context was the patch. Harmless a second
    time, and for a model that is not patched."""
    before, patched = None, False
    for module in model.modules():
        before = module.__dict__.pop(BEFORE, before)
        patched |= unpatch_layer(module)
    if before is None and not patched:
        return
    target = text_config(model)
    name, settings = before or (None, getattr(target, "hip", None))
    if settings is None:
        target.__dict__.pop("hip", None)
    else:
        extending = settings.get("extend") is not None
        target.hip = {**settings, "extend": None} if extending else settings
    if name is not None:
        set_attention(model, name)
