"""What is known to go wrong with a model or its settings before a forward has touched anything."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from hip_hf.config import HiPConfig
from hip_hf.integration.extension import check_extension
from hip_hf.integration.reach import ignored
from hip_hf.integration.settings import read_settings

NO_ATTENTIONS = "output_attentions: got True, allowed: False (the attention matrix never exists; use `eager`)"

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


_foreign: dict[type, bool] = {}


def refuse_foreign_model(config: PreTrainedConfig | None) -> None:
    """Raise ValueError for a model that accepts any attention name but ignores it (Bloom, MPT, ...), changes masks
    (DeepSeek-V4), or has layers that choose keys by themselves (DeepSeek-V3.2)."""
    if config is None:
        return
    if any("compressed" in kind for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"attn_implementation: got {config._attn_implementation!r} for model type {config.model_type!r} with compressed "
            "layers, which put compressed keys behind the others and extend the mask for them; allowed: `eager`"
        )
    # Transformers 5.17 names no such layers: there the count of keys that they choose says it
    chooses = getattr(config, "index_topk", None) is not None
    if chooses or "indexed_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"indices: {config.model_type} passes the layer's own sparse indices, allowed: None")
    kind = type(config)
    if kind not in _foreign:
        model = next((m[kind] for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if kind in m), None)
        can_set = getattr(model, "_can_set_attn_implementation", None)
        _foreign[kind] = can_set is not None and not can_set()
    if _foreign[kind]:
        raise ignored(config._attn_implementation, config.model_type)
