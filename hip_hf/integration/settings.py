"""What a model's config says of its attention: by which of the registered names it attends, and its
settings, which live in the text config as `hip`, a plain dict, and are saved and loaded with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hip_hf.config import HiPConfig
from hip_hf.shown import refused

# The names under which this attention is registered with Transformers, and the method each of them
# forces (None: the one in the settings).
NAMES = {"hip": None, "streaming": "streaming", "hyper": "hyper"}


def is_ours(name: Any) -> bool:
    """Whether it is one of the registered names."""
    return isinstance(name, str) and name in NAMES


def attends_by_us(config: Any) -> bool:
    """Whether a model with this text config attends by one of the registered names."""
    return is_ours(getattr(config, "_attn_implementation", None))


def text_config(model: nn.Module) -> Any:
    """The config of the model's language part. Raises ValueError if there is none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        got = f"{type(model).__name__} without a Transformers config"
        raise refused("model", got, "a pretrained model")
    found = config.get_text_config(decoder=True)
    # of an encoder-decoder with one flat config (Bart, Pegasus) that is a copy, in which settings
    # would be lost
    return found if any(found is part for part in (config, *vars(config).values())) else config


def text_part(model: nn.Module) -> str:
    """Name of the language part's config in the model's config; empty where it is that itself."""
    config: Any = model.config
    target = text_config(model)
    return next((name for name in config.sub_configs if getattr(config, name, None) is target), "")


def read_settings(config: Any) -> HiPConfig:
    """The settings in a model config, `HiPConfig()` without any. Raises ValueError for bad ones."""
    raw = getattr(config, "hip", None)
    return HiPConfig() if raw is None else HiPConfig.from_dict(without_deleted_mode(raw))


def without_deleted_mode(raw: Any) -> Any:
    """Saved settings without a mode of Delta correction that is gone, where nothing is corrected:
    earlier versions saved it with every model."""
    if not isinstance(raw, Mapping) or raw.get("delta_mode") != "clusters":
        return raw
    layers = raw.get("layers")
    parts = [raw, *(layers.values() if isinstance(layers, Mapping) else ())]
    if any(isinstance(part, Mapping) and part.get("delta") is not None for part in parts):
        return raw
    return {name: value for name, value in raw.items() if name != "delta_mode"}


def layer_index(module: nn.Module) -> int | None:
    """The index of an attention layer among the model's layers, None where it has none: a layer
    that several places share (Zamba) has no index, or -1 (Zamba 2), and the rules for single layers
    do not apply to it."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) and index >= 0 else None


def layer_settings(module: nn.Module, method: str | None) -> HiPConfig:
    """The settings of one attention layer; `method` overrides the method in them. They are parsed
    anew only when the model's config changed."""
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
