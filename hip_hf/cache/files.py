"""Caches on disk: safetensors, written beside the target and moved into place, checked in full before anything changes."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hip_hf.cache.pages import Store

if TYPE_CHECKING:
    from hip_hf.integration.hip_cache import HiPCache

FORMAT = "hip_hf.cache.1"
# What safetensors calls the dtypes that a cache may have.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Tokens that are written at once.
_TOKENS_AT_ONCE = 4096


def _kind(layer: Any) -> str:
    from hip_hf.integration.hip_cache import PagedLayer

    if type(layer) is PagedLayer:
        return "paged"
    if type(layer) is DynamicSlidingWindowLayer:
        return "sliding"
    raise ValueError(f"cache: got a {type(layer).__name__}, allowed: full-attention and sliding-window layers")


def _model(cache: HiPCache) -> dict[str, Any]:
    """What must agree for a saved cache to make sense to a model."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    model = {name: getattr(cache.config, name, None) for name in names}
    # of tensor parallelism, which heads are held; a whole cache does not say that it is
    return model if cache.shard is None else {**model, "shard": list(cache.shard)}


def _tensors(cache: HiPCache) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape `[B, Hkv, T, D]` and dtype of all that the layers hold, as the file names it."""
    layers: list[Any] = cache.layers
    return {f"{index}.{name}": held for index, layer in enumerate(layers) for name, held in _held(layer).items()}


def _held(layer: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    if not layer.is_initialized:
        return {}
    if _kind(layer) == "paged":
        stores = {"keys": layer.pool.keys, "values": layer.pool.values}
        sizes = {name: torch.Size((len(layer.tables), store.heads, layer.length, store.dim)) for name, store in stores.items()}
        return {name: (size, stores[name].dtype) for name, size in sizes.items()}
    return {name: (x.shape, x.dtype) for name, x in (("keys", layer.keys), ("values", layer.values))}


def _parts(layer: Any, name: str) -> Iterator[torch.Tensor]:
    """A layer's keys or values in the order of a contiguous `[B, Hkv, T, D]`, a bounded part at a time."""
    if _kind(layer) != "paged":
        yield getattr(layer, name)
        return
    store = getattr(layer.pool, name)
    for table in layer.tables:
        for head in range(store.heads):
            for first in range(0, layer.length, _TOKENS_AT_ONCE):
                last = min(first + _TOKENS_AT_ONCE, layer.length)
                yield Store.read(store, slice(head, head + 1), table, first, last)  # of an offloaded store past its pool


def save(cache: HiPCache, path: str | os.PathLike[str], made_of: dict[str, Any]) -> None:
    """See `HiPCache.save`. Streams: no second copy of the cache is made."""
    path = Path(path)
    held: list[Any] = cache.layers
    kinds = [_kind(layer) for layer in held]
    tensors = _tensors(cache)
    layers = [
        {"kind": kind, "length": int(layer.get_seq_length()), "unrotated": getattr(layer, "unrotated", False)}
        for kind, layer in zip(kinds, held, strict=True)
    ]
    facts = {"model": _model(cache), "layers": layers, "made_of": made_of}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, **{name: json.dumps(fact) for name, fact in facts.items()}}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in tensors:
                index, kind = name.split(".")
                for part in _parts(cache.layers[int(index)], kind):
                    file.write(part.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _fail(path: Path, got: object, allowed: str) -> None:
    raise ValueError(f"path {str(path)!r}: got {got}, allowed: {allowed}")


def _check_made_of(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError where a file was made of something else, and name the first difference."""
    wanted = json.loads(json.dumps(wanted))  # as it comes back from a file
    for name in {**wanted, **saved}:
        if saved.get(name) != wanted.get(name):
            _fail(path, f"a cache made with {name}={saved.get(name)!r}", f"{name}={wanted.get(name)!r}")


def load(cache: HiPCache, path: str | os.PathLike[str], device: torch.device, made_of: dict[str, Any] | None) -> None:
    """See `HiPCache.load`."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, which is no file, allowed: a file written by HiPCache.save")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"path {str(path)!r}: got a truncated or foreign file ({error}), allowed: one of HiPCache.save"
        ) from None
    with file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            _fail(path, f"format {metadata.get('format')!r}", f"{FORMAT!r}")
        if json.loads(metadata["model"]) != _model(cache):
            _fail(path, f"a cache of {metadata['model']}", f"one of this model, {json.dumps(_model(cache))}")
        if made_of is not None:
            _check_made_of(path, json.loads(metadata.get("made_of", "{}")), made_of)
        saved = json.loads(metadata["layers"])
        kinds = [_kind(layer) for layer in cache.layers]
        if [layer["kind"] for layer in saved] != kinds:
            _fail(path, f"layers {[layer['kind'] for layer in saved]}", f"{kinds}, as this model has")
        names = set(file.keys())
        fresh = [_fresh(cache, layer) for layer in cache.layers]
        for index, (layer, known) in enumerate(zip(fresh, saved, strict=True)):
            if f"{index}.keys" not in names:
                continue
            keys, values = (file.get_slice(f"{index}.{name}") for name in ("keys", "values"))
            _fill(layer, keys, values, known, device)
    cache.layers[:] = fresh


def _fresh(cache: HiPCache, layer: Any) -> Any:
    """An empty layer like this one."""
    return cache.make_layer(DynamicLayer()) if _kind(layer) == "paged" else DynamicSlidingWindowLayer(layer.sliding_window)


def _fill(layer: Any, keys: Any, values: Any, known: dict[str, Any], device: torch.device) -> None:
    length = known["length"]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.lazy_initialization(*(x[:, :, :0].to(device) for x in (keys, values)))
        layer.keys, layer.values = keys[:].to(device), values[:].to(device)
        layer.cumulative_length = length
        return
    for first in range(0, length, _TOKENS_AT_ONCE):
        part = slice(first, min(first + _TOKENS_AT_ONCE, length))
        layer.append(keys[:, :, part].to(device), values[:, :, part].to(device))
    layer.unrotated = known.get("unrotated", False)
