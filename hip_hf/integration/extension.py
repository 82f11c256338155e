"""Context extension in models: which layers it concerns, what is known of their RoPE, and caches of
un-rotated keys.

Two ways to un-rotated keys. A patched layer (`patches`) hands them over. For some other families,
whose RoPE is known to be of Llama's layout with nothing after it, what the layer rotated is rotated
back as it comes: queries in the attention function, keys as a `HiPCache` stores them. A constant
missing in these positions (padding) turns both alike: no product changes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.models import auto

from hip_hf.config import HiPConfig
from hip_hf.integration.patches.families import families
from hip_hf.integration.settings import layer_index
from hip_hf.rope import CHUNK_INDEXED_LAYERS, Positions, Rope
from hip_hf.shown import refused

# Kinds of RoPE whose angles are a fixed multiple of the position.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_NOT_FIXED = {
    "dynamic": "its frequencies change with the length of the text",
    "longrope": "its frequencies switch with the length of the text",
}
# Families without a patcher whose rotated keys can be rotated back
# (tests/integration/test_extension_models.py tries each).
ROTATED_BACK = ("gemma", "granite", "olmo", "olmo2", "phi3", "starcoder2", "stablelm")
_NOT_ROTATED_BACK = {
    "hunyuan_v1_dense": "it normalises q and k after RoPE",
    "hunyuan_v1_moe": "it normalises q and k after RoPE",
    "smollm3": "some of its layers have no RoPE",
    "cohere2": "some of its layers have no RoPE",
}
# Attribute of keys that are not rotated.
UNROTATED = "_hip_unrotated"


def extends(config: Any) -> bool:
    """Whether a model with this text config extends the context. Every layer asks at every step."""
    raw = getattr(config, "hip", None)
    return isinstance(raw, dict) and raw.get("extend") is not None


def refuse_followed(config: Any, follower: str) -> None:
    """Raise ValueError if a model with this text config extends the context where `follower`
    follows its tensors."""
    if follower and extends(config):
        got = f"{config.hip['extend']!r} under {follower}, which gets dense attention"
        raise refused("extend", got, "None")


def extended(module: Any, sliding_window: int | None) -> bool:
    """Whether a layer's queries and keys are placed by `positions_of`. Sliding layers, which never
    look past what was trained, stay as they are."""
    return sliding_window is None and extends(module.config)


def check_extension(settings: HiPConfig, config: Any) -> None:
    """Raise ValueError, with the reason, if `settings` extend the context and a model with this
    text config cannot."""
    if settings.extend is None:
        return
    field = f"HiPConfig.extend: got {settings.extend!r}, allowed for this model: None"
    kind, known = config.model_type, (*families(), *ROTATED_BACK)
    if kind not in known:
        why = _NOT_ROTATED_BACK.get(kind, "its layout of RoPE is not known")
        why = f"its keys cannot be rotated back: {why}; known are {' | '.join(known)}"
        raise ValueError(f"{field} ({kind} has no patcher, and {why})")
    rope = getattr(config, "rope_parameters", None)
    name = rope.get("rope_type", "default") if isinstance(rope, dict) else None
    if name not in ROPE_TYPES:
        why = _NOT_FIXED.get(name or "", f"known are {' | '.join(ROPE_TYPES)}")
        raise ValueError(f"{field} (RoPE of type {name!r}: {why})")
    positions = Positions(rope_of(config), config.max_position_embeddings)
    for layer in (None, *settings.layers):
        positions.check(settings.for_layer(layer))


# by the frequencies themselves: nothing else tells them apart for sure
_ropes: dict[tuple[bytes, float], Rope] = {}


def rope_of(config: Any, head_dim: int | None = None) -> Rope:
    """The rotation of models with this text config, from the rotary embedding of their modeling
    file, which is made anew: not for every step. The same object for all that rotate alike, for its
    tables. `head_dim`: of what is to be rotated. Raises ValueError where the config is of no model
    of Transformers, the file has no such class, or several, or it turns more than a head has."""
    known = next((kind for kind in type(config).__mro__ if kind in auto.MODEL_MAPPING), None)
    if known is None:
        got = f"a model with {type(config).__name__}"
        raise refused("extend", got, "configs of Transformers' own models")
    source = sys.modules[auto.MODEL_MAPPING[known].__module__]
    embeddings = [x for name, x in vars(source).items() if name.endswith("RotaryEmbedding")]
    found = [kind for kind in embeddings if isinstance(kind, type)]
    if len(found) != 1:
        what = f"{source.__name__} has {len(found)} rotary embeddings"
        raise ValueError(f"extend: {what}, allowed: one")
    with torch.device("cpu"):
        embedding: Any = found[0](config)
    rope = Rope(embedding.inv_freq, embedding.attention_scaling)
    if head_dim is not None and rope.dim > head_dim:
        got = f"a RoPE that turns {rope.dim} numbers of a head"
        raise refused("config", got, f"up to its layers' {head_dim}")
    return _ropes.setdefault((rope.inv_freq.numpy().tobytes(), rope.scaling), rope)


def positions_of(module: Any, settings: HiPConfig) -> Positions:
    """How the calls of an attention layer place queries and keys, by tables of all layers of such
    models. Raises ValueError for a model that cannot be extended so, or too short heads."""
    kept = module.__dict__.get("_hip_positions")
    if kept is not None and kept[0] is settings:
        return kept[1]
    config = module.config
    check_extension(settings, config)
    by_chunk = (layer_index(module) or 0) < CHUNK_INDEXED_LAYERS
    rope = rope_of(config, module.head_dim)
    positions = Positions(rope, config.max_position_embeddings, by_chunk)
    module.__dict__["_hip_positions"] = (settings, positions)
    return positions


def other_cache(what: str, extend: Any) -> ValueError:
    """The error of extending the context with a cache that may hold rotated keys."""
    allowed = f"allowed with extend={extend!r}: a HiPCache, which `generate` makes by itself"
    return ValueError(f"past_key_values: got {what}, {allowed}")


def unrotate(
    positions: Positions, query: torch.Tensor, key: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate back the queries `[B, Hq, Tq, D]` and keys `[B, Hkv, Tk, D]` of a layer that rotates
    them itself: all the keys where this call brought them; a `HiPCache` has rotated back its own
    when they came. Raises ValueError for keys in a cache of another kind."""
    first = key.shape[2] - query.shape[2]
    if cache is not None:
        raise refused("extend", "continuous batching without a patcher", "a patched family")
    if not getattr(key, UNROTATED, False):
        if first:
            raise other_cache("another one, whose keys are rotated", "streaming")
        key = positions.rope.unrotate(key, 0)
    return positions.rope.unrotate(query, first), key
