"""What the file of a `HiPCache` holds: which layers, of which model, made of what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hip_hf.cache.files import TOKENS_AT_ONCE, fail, paged_parts, reading, write
from hip_hf.integration.settings import refused


def _kind(layer: Any) -> str:
    """`paged` or `sliding`: a layer in pages says itself what it is. Raises ValueError for a layer
    that no file can hold."""
    kind = "sliding" if type(layer) is DynamicSlidingWindowLayer else getattr(layer, "kind", "")
    if kind not in ("paged", "sliding"):
        allowed = "full-attention and sliding-window layers"
        raise refused("cache", f"a {type(layer).__name__}", allowed)
    return kind


def _model(cache: Any) -> dict[str, Any]:
    """What must agree for a saved cache to make sense to a model."""
    names = ["model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim"]
    model = {name: getattr(cache.config, name, None) for name in names}
    # of tensor parallelism, which heads are held; a whole cache does not say that it is
    return model if cache.shard is None else {**model, "shard": list(cache.shard)}


def save(cache: Any, path: str | os.PathLike[str], made_of: dict[str, Any]) -> None:
    """See `HiPCache.save`; `cache` is one."""
    tensors, layers = {}, []
    for index, layer in enumerate(cache.layers):
        kind, length = _kind(layer), int(layer.get_seq_length())
        unrotated = getattr(layer, "unrotated", False)
        layers.append({"kind": kind, "length": length, "unrotated": unrotated})
        for name in ("keys", "values") if layer.is_initialized else ():
            if kind == "paged":
                held = getattr(layer.pool, name)
                shape = torch.Size((len(layer.tables), held.heads, layer.length, held.dim))
                parts: Any = paged_parts(held, layer.tables, layer.length)
            else:
                held = getattr(layer, name)
                shape, parts = held.shape, [held]
            tensors[f"{index}.{name}"] = shape, held.dtype, parts
    write(Path(path), {"model": _model(cache), "layers": layers, "made_of": made_of}, tensors)


def load(
    cache: Any, path: str | os.PathLike[str], device: torch.device, made_of: dict[str, Any] | None
) -> None:
    """See `HiPCache.load`; `cache` is one."""
    path = Path(path)
    with reading(path) as (file, facts):
        model = _model(cache)
        if facts["model"] != model:
            got = f"a cache of {json.dumps(facts['model'])}"
            fail(path, got, f"one of this model, {json.dumps(model)}")
        made, wanted = facts.get("made_of", {}), json.loads(json.dumps(made_of))  # as from a file
        for name in {} if wanted is None else {**wanted, **made}:
            got, asked = made.get(name), wanted.get(name)
            if got != asked:
                fail(path, f"a cache made with {name}={got!r}", f"{name}={asked!r}")
        kinds, saved = [_kind(layer) for layer in cache.layers], facts["layers"]
        found = [layer["kind"] for layer in saved]
        if found != kinds:
            fail(path, f"layers {found}", f"{kinds}, as this model has")
        names = set(file.keys())
        fresh: list[Any] = []
        for index, (layer, known) in enumerate(zip(cache.layers, saved, strict=True)):
            paged = known["kind"] == "paged"
            own = DynamicLayer() if paged else DynamicSlidingWindowLayer(layer.sliding_window)
            fresh.append(cache.make_layer(own))
            if f"{index}.keys" in names:
                keys, values = (file.get_slice(f"{index}.{name}") for name in ("keys", "values"))
                _fill(fresh[-1], keys, values, known, device)
    cache.layers[:] = fresh


def _fill(layer: Any, keys: Any, values: Any, known: dict[str, Any], device: torch.device) -> None:
    """Give an empty layer what the file's slices `[B, Hkv, T, D]` hold. `known`: what the file says
    of the layer."""
    length = known["length"]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.lazy_initialization(*(x[:, :, :0].to(device) for x in (keys, values)))
        layer.keys, layer.values = keys[:].to(device), values[:].to(device)
        layer.cumulative_length = length
        return
    for first in range(0, length, TOKENS_AT_ONCE):
        part = slice(first, min(first + TOKENS_AT_ONCE, length))
        layer.append(keys[:, :, part].to(device), values[:, :, part].to(device))
    layer.unrotated = known.get("unrotated", False)
