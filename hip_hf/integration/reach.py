"""Which layers of a model ask Transformers for its attention function. A model whose language part has none would accept
`hip` and ignore it: it is refused as it is made, and where `set_attn_implementation` asks for it. So is one that is shared out
among more processes than its key heads can be."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from hip_hf.integration.names import is_ours
from hip_hf.integration.settings import text_config

# The table of attention functions, as modeling files call it.
_TABLE = "ALL_ATTENTION_FUNCTIONS"
# How a file calls a table of attention *classes*, one for each name that it knows (Falcon, GPT-Neo, GIT).
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


def _makes_masks(kind: type) -> bool:
    """Whether models of this class let Transformers make masks, which for `hip` are ours."""
    return any(name.startswith("create_") and name.endswith("mask") for name in _names(kind))


def attention_layers(model: nn.Module) -> list[Any]:
    """The modules that ask for an attention function and know where among the layers they stand: those of the text."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and _asks(type(module))]


def _is_language_model(model: PreTrainedModel) -> bool:
    """Whether it is a whole model of text, with or without its head: encoders of images, of sound, or of the text that a decoder
    is given, may attend as they like."""
    kind = type(model.config)
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    whole: Any = MODEL_MAPPING[kind] if generates and kind in MODEL_MAPPING else ()
    return model.can_generate() or isinstance(model, whole)


def ignored(name: str | None, model_type: str) -> ValueError:
    """The error for a model that would ignore an attention of this name."""
    return ValueError(
        f"attn_implementation: got {name!r} for model type {model_type!r}, whose language part does not ask Transformers' "
        "AttentionInterface and would ignore it; allowed: architectures that do (Llama, Mistral, Qwen, Gemma, Phi, GPT-OSS, ...)"
    )


def check_class(model: PreTrainedModel, name: str | None) -> None:
    """Raise ValueError, before layers are made, for a model whose file picks attention classes from a table without `name`."""
    if not is_ours(name):
        return
    for key, table in vars(sys.modules[type(model).__module__]).items():
        if key.endswith(_CLASSES) and isinstance(table, dict) and name not in table:
            raise ValueError(
                f"attn_implementation: got {name!r} for model type {model.config.model_type!r}, allowed: {' | '.join(table)} "
                '(a part that is not of language may have one of these, and the language `hip`: {"text_config": "hip", ...})'
            )


def check_reach(model: PreTrainedModel, name: str | None) -> None:
    """Raise ValueError for a language model no layer of whose text part asks for an attention function, and for any part of a
    model (the encoder of BigBird-Pegasus) that would hand masks of ours to attention of its own."""
    if not is_ours(name) or not (_is_language_model(model) or _makes_masks(type(model))):
        return
    kinds = {type(module.config) for module in model.modules() if hasattr(module, "config") and _asks(type(module))}
    if not kinds:
        raise ignored(name, model.config.model_type)
    if type(text_config(model)) not in kinds:  # BLT, Qwen2.5-Omni
        raise ValueError(
            f"attn_implementation: got {name!r} for model type {model.config.model_type!r}, whose layers do not read its text "
            "config, so that no settings would reach them; allowed: `eager`, or `hip` for a part of it that is loaded by itself"
        )


def check_heads(model: PreTrainedModel, name: str | None) -> None:
    """Raise ValueError for tensor parallelism that would cut key heads into pieces. Transformers cuts them, and the first call
    of the model then fails with sizes that do not say why."""
    distributed: Any = getattr(model.config, "distributed_config", None)
    processes = getattr(distributed, "tp_size", None) or 1
    if processes == 1 or not is_ours(name):
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
            raise ValueError(
                f"tp_size: got {processes} processes for the {heads} key heads of {type(model).__name__}, allowed: {allowed} "
                "(each process holds whole heads)"
            )
