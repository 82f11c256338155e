"""What is known to go wrong with a model or its settings before a forward has touched anything.

A model whose language part does not ask Transformers for its attention function would accept `hip`
and ignore it: it is refused as it is made, and where `set_attn_implementation` asks for it. So is
one that is shared out among more processes than its key heads can be.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models import auto

from hip_hf.config import HiPConfig
from hip_hf.integration.extension import check_extension
from hip_hf.integration.settings import is_ours, read_settings, text_config
from hip_hf.shown import refused

NO_ATTENTIONS = (
    "output_attentions: got True, allowed: False (the attention matrix never exists; use `eager`)"
)

_valid: dict[str, Any] | None = None  # the last settings that were found to be so
# the last that name layers or extend the context, with the model's config that they suit
_fitting: tuple[weakref.ref[Any], dict[str, Any] | None] | None = None


def check_config(config: Any) -> None:
    """Raise ValueError, before a forward has touched anything, for a model config with invalid
    settings, with layers that the model does not have, with `extend` for a model that cannot, or
    with outputs that we cannot give. Settings are looked at only where the last ones differ."""
    if getattr(config, "output_attentions", False):
        raise ValueError(NO_ATTENTIONS)
    raw = getattr(config, "hip", None)
    if raw is not None:
        _check_settings(config, raw)


# Dynamo calls the function when it makes a graph, which is guarded by the config's identity and by
# what its settings say.
@torch.compiler.assume_constant_result
def _check_settings(config: Any, raw: Mapping[str, Any]) -> None:
    """`check_config` of the settings `raw`."""
    global _valid, _fitting
    if raw != _valid:
        read_settings(config)
        _valid = copy.deepcopy(dict(raw))
    named = raw.get("layers") or isinstance(raw.get("dense_layers"), (list, tuple))
    of_model = named or raw.get("extend") is not None
    if of_model and (_fitting is None or _fitting[0]() is not config or _fitting[1] != raw):
        settings = read_settings(config)
        check_layers(settings, config)
        check_extension(settings, config)
        _fitting = weakref.ref(config), _valid


def check_layers(settings: HiPConfig, config: Any) -> None:
    """Raise ValueError if `settings` name layers that a model with this text config lacks."""
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if count is None:
        return
    listed = settings.dense_layers if isinstance(settings.dense_layers, list) else []
    for layer in (*settings.layers, *listed):
        if layer >= count:
            raise refused("layer", f"{layer}", f"0 to {count - 1}, the layers of this model")


_foreign: dict[type, bool] = {}


def refuse_foreign_model(config: PreTrainedConfig | None) -> None:
    """Raise ValueError for a model that accepts any attention name but ignores it (Bloom, MPT,
    ...), changes masks (DeepSeek-V4), or has layers that choose keys by themselves
    (DeepSeek-V3.2)."""
    if config is None:
        return
    layer_types = getattr(config, "layer_types", None) or ()
    if any("compressed" in kind for kind in layer_types):
        why = " with compressed layers, which put compressed keys behind the others and extend the"
        why += " mask for them; allowed: `eager`"
        raise _refused(config._attn_implementation, config, why)
    # Transformers 5.17 names no such layers: there the count of keys that they choose says it
    chooses = getattr(config, "index_topk", None) is not None
    if chooses or "indexed_attention" in layer_types:
        what = f"{config.model_type} passes the layer's own sparse indices"
        raise ValueError(f"indices: {what}, allowed: None")
    kind = type(config)
    if kind not in _foreign:
        tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_MAPPING)
        model = next((table[kind] for table in tables if kind in table), None)
        can_set = getattr(model, "_can_set_attn_implementation", None)
        _foreign[kind] = can_set is not None and not can_set()
    if _foreign[kind]:
        raise _refused(config._attn_implementation, config, _IGNORED)


# The table of attention functions, as modeling files call it.
_TABLE = "ALL_ATTENTION_FUNCTIONS"
# How a file calls a table of attention *classes* by the names that it knows (Falcon, GPT-Neo, GIT).
_CLASSES = "ATTENTION_CLASSES"


@functools.cache
def _names(kind: type) -> frozenset[str]:
    """All names that the methods of a model's or a layer's class look up."""
    names: set[str] = set()
    for part in kind.__mro__:
        if part in (nn.Module, PreTrainedModel):  # Transformers' own know of everything
            break
        for method in vars(part).values():
            if isinstance(method, FunctionType):
                names.update(inspect.unwrap(method).__code__.co_names)
    return frozenset(names)


def _asks(kind: type) -> bool:
    """Whether layers of this class look up the attention function."""
    return _TABLE in _names(kind)


def attention_layers(model: nn.Module) -> list[Any]:
    """The modules that ask for an attention function and know where among the layers they stand:
    those of the text."""
    return [x for x in model.modules() if hasattr(x, "layer_idx") and _asks(type(x))]


_IGNORED = ", whose language part does not ask Transformers' AttentionInterface and would ignore it"
_IGNORED += "; allowed: architectures that do (Llama, Mistral, Qwen, Gemma, Phi, GPT-OSS, ...)"


def _refused(name: str | None, config: PreTrainedConfig, why: str) -> ValueError:
    """The error for a model with this config that cannot have an attention of this name."""
    got = f"got {name!r} for model type {config.model_type!r}"
    return ValueError(f"attn_implementation: {got}{why}")


def check_class(model: PreTrainedModel, name: str | None) -> None:
    """Raise ValueError, before layers are made, for a model whose file picks attention classes from
    a table without `name`."""
    if not is_ours(name):
        return
    for key, table in vars(sys.modules[type(model).__module__]).items():
        if key.endswith(_CLASSES) and isinstance(table, dict) and name not in table:
            what = "a part that is not of language may have one of these, and the language `hip`"
            why = f'({what}: {{"text_config": "hip", ...}})'
            raise _refused(name, model.config, f", allowed: {' | '.join(table)} {why}")


def check_model(model: PreTrainedModel, name: str | None) -> None:
    """Raise ValueError for a model that has been made and would ignore an attention of this name,
    or is shared out among more processes than its key heads can be."""
    if is_ours(name):
        _check_reach(model, name)
        _check_heads(model)


def _check_reach(model: PreTrainedModel, name: str | None) -> None:
    """Raise ValueError for a language model no layer of whose text part asks for an attention
    function, and for any part of a model (the encoder of BigBird-Pegasus) that would hand position
    masks to attention of its own."""
    # a whole model of text, with or without its head, or one for which Transformers makes masks:
    # encoders of images, of sound, or of the text that a decoder is given, may attend as they like
    kind: Any = type(model)
    config: Any = type(model.config)
    tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    generates = any(config in table for table in tables) and config in auto.MODEL_MAPPING
    whole: Any = auto.MODEL_MAPPING[config] if generates else ()
    masks = any(x.startswith("create_") and x.endswith("mask") for x in _names(kind))
    if not (model.can_generate() or isinstance(model, whole) or masks):
        return
    modules: list[Any] = [x for x in model.modules() if hasattr(x, "config") and _asks(type(x))]
    kinds = {type(module.config) for module in modules}
    if not kinds:
        raise _refused(name, model.config, _IGNORED)
    if type(text_config(model)) not in kinds:  # BLT, Qwen2.5-Omni
        why = ", whose layers do not read its text config, so that no settings would reach them; "
        why += "allowed: `eager`, or `hip` for a part of it that is loaded by itself"
        raise _refused(name, model.config, why)


def _check_heads(model: PreTrainedModel) -> None:
    """Raise ValueError for tensor parallelism that would cut key heads into pieces. Transformers
    cuts them, and the first call of the model then fails with sizes that do not say why."""
    distributed: Any = getattr(model.config, "distributed_config", None)
    processes = getattr(distributed, "tp_size", None) or 1
    if processes == 1:
        return
    plan = dict(model.tp_plan or {})
    if isinstance(distributed.tp_plan, dict):
        plan |= distributed.tp_plan
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\d+", "*", f"{path}.k_proj"))
        if style != "colwise" or not hasattr(module, "head_dim"):
            continue
        heads = module.k_proj.out_features // module.head_dim
        if heads % processes:
            allowed = " | ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
            got = f"{processes} processes for the {heads} key heads of {type(model).__name__}"
            raise refused("tp_size", got, f"{allowed} (each process holds whole heads)")
