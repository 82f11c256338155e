"""Settings of a model: they live in its text config as `hip`, a plain dict, and are saved and loaded with it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hip_hf.config import HiPConfig

NO_ATTENTIONS = "output_attentions: got True, allowed: False (the attention matrix never exists; use `eager`)"


def text_config(model: nn.Module) -> Any:
    """The config of the model's language part. Raises ValueError if there is none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"model: got {type(model).__name__} without a Transformers config, allowed: a pretrained model")
    found = config.get_text_config(decoder=True)
    # of an encoder-decoder with one flat config (Bart, Pegasus) that is a copy, in which settings would be lost
    return found if any(found is part for part in (config, *vars(config).values())) else config


def text_part(model: nn.Module) -> str:
    """What the config of the language part is called in the model's config; empty where it is that config itself."""
    config: Any = model.config
    target = text_config(model)
    return next((name for name in config.sub_configs if getattr(config, name, None) is target), "")


def read_settings(config: Any) -> HiPConfig:
    """The settings in a model config; `HiPConfig()` where it has none. Raises ValueError if they are invalid."""
    raw = getattr(config, "hip", None)
    return HiPConfig() if raw is None else HiPConfig.from_dict(raw)


_valid: dict[str, Any] | None = None  # the last settings that were found to be so
# the last that name layers or extend the context, with the model's config that they suit
_fitting: tuple[weakref.ref[Any], dict[str, Any] | None] | None = None


def check_config(config: Any) -> None:
    """Raise ValueError, before a forward has touched anything, for a model config with invalid settings, with layers that the
    model does not have, with `extend` for a model that cannot, or with outputs that we cannot give. Settings are looked at only
    when they are not the last ones that were."""
    if getattr(config, "output_attentions", False):
        raise ValueError(NO_ATTENTIONS)
    raw = getattr(config, "hip", None)
    if raw is not None:
        _check_settings(config, raw)


# Dynamo calls the function when it makes a graph, which is guarded by the config's identity and by what its settings say.
@torch.compiler.assume_constant_result
def _check_settings(config: Any, raw: Mapping[str, Any]) -> None:
    """`check_config` of the settings `raw`."""
    global _valid, _fitting
    if raw != _valid:
        read_settings(config)
        _valid = copy.deepcopy(dict(raw))
    of_model = raw.get("extend") is not None or raw.get("layers") or isinstance(raw.get("dense_layers"), (list, tuple))
    if of_model and (_fitting is None or _fitting[0]() is not config or _fitting[1] != raw):
        from hip_hf.integration.extension import check_extension

        settings = read_settings(config)
        check_layers(settings, config)
        check_extension(settings, config)
        _fitting = weakref.ref(config), _valid


def check_layers(settings: HiPConfig, config: Any) -> None:
    """Raise ValueError if `settings` name layers that a model with this text config does not have."""
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if count is None:
        return
    named = [*settings.layers, *(settings.dense_layers if isinstance(settings.dense_layers, list) else [])]
    for layer in named:
        if layer >= count:
            raise ValueError(f"layer: got {layer}, allowed: 0 to {count - 1}, the layers of this model")


def configure(model: nn.Module, config: HiPConfig | None = None, **fields: Any) -> HiPConfig:
    """Set how a model attends; takes effect at its next call and is saved with its config.

    Args:
        model: a Transformers model; what the settings change is its `config.hip` (of the text config).
        config: replaces the present settings; None keeps them.
        fields: single fields of `HiPConfig`, merged over `config` or the present settings.

    Returns:
        The settings that now hold.

    Raises:
        ValueError: unknown or out-of-range fields, layers that the model does not have, or `extend` for a model that cannot.
            Nothing has changed then.
    """
    from hip_hf.integration.extension import check_extension
    from hip_hf.integration.patches.registry import layers_to_extend, patch_layers

    target = text_config(model)
    if config is not None and not isinstance(config, HiPConfig):
        raise ValueError(f"config: got {type(config).__name__}, allowed: HiPConfig or None")
    settings = read_settings(target) if config is None else config
    if fields:
        settings = HiPConfig.from_dict({**settings.to_dict(), **fields})
    check_layers(settings, target)
    check_extension(settings, target)
    patched = [] if settings.extend is None else layers_to_extend(model)
    target.hip = settings.to_dict()
    patch_layers(patched)
    return settings


def is_ours(name: Any) -> bool:
    """Whether it is the name of one of our registered functions."""
    from hip_hf.integration.attention_function import NAMES  # which imports the caches

    return isinstance(name, str) and name in NAMES


def attends_by_us(config: Any) -> bool:
    """Whether a model with this text config attends by one of our registered functions."""
    return is_ours(getattr(config, "_attn_implementation", None))


def layer_index(module: nn.Module) -> int | None:
    """The index of an attention layer among the model's layers, None where it has none: a layer that several places share
    (Zamba) has no index, or -1 (Zamba 2), and the rules for single layers do not apply to it."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) and index >= 0 else None


def layer_settings(module: nn.Module, method: str | None) -> HiPConfig:
    """The settings of one attention layer; `method` overrides theirs. Parsed anew only when the model's config changed."""
    raw = getattr(module.config, "hip", None)
    kept = module.__dict__.get("_hip_settings")
    if kept is not None and kept[0] == raw and kept[1] == method:
        return kept[2]
    settings = read_settings(module.config)
    if method is not None and method != settings.method:
        fields = {key: value for key, value in settings.to_dict().items() if key != "options"}
        settings = HiPConfig.from_dict({**fields, "method": method})
    settings = settings.for_layer(layer_index(module))
    module.__dict__["_hip_settings"] = (None if raw is None else {**raw}, method, settings)
    return settings
