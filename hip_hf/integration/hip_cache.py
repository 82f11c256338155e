"""`HiPCache`: a Transformers cache whose full-attention layers keep keys and values in pages.

A token is appended in place: no copy and no allocation that grows with the context. Beside the
pages lie the pyramid and the selection (`DecodeState`), so that selecting never rereads the keys.
Sequences share pages by reference (beam search, repeated prompts); the last page is copied before
one of them continues it.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from hip_hf.cache import files
from hip_hf.cache.offload import OFFLOADS, READERS, Statistics, Traffic
from hip_hf.integration.cache_layers import (
    CACHE,
    HiPHybridStaticLayer,
    HiPStaticLayer,
    newest,
    outside_of_graphs,
    unusable,
)
from hip_hf.integration.changes import set_attribute, set_item
from hip_hf.integration.paged_layer import PagedHybridLayer, PagedLayer
from hip_hf.integration.settings import attends_by_us
from hip_hf.shown import refused


class HiPCache(DynamicCache):
    """A Transformers cache in pages, for `past_key_values` of any model; what `generate` makes for
    a `hip` model.

    Args:
        config: the *model's* config (`model.config`), by which layers are laid out. Its
            `_attn_implementation` is read at every update: `hip` gets handles to pages, any other
            attention gets ordinary tensors.
        offload: None; `cpu` keeps the pages in host memory, `disk` in a memory-mapped temporary
            file.
        device_pages: with `offload`, the pages of values that a layer holds on the device for every
            head; of keys, which the search reads as well as attention, it holds twice as many.
        others: further arguments of `DynamicCache`, by name, each at its default: some models make
            their caches with all of them.

    Sliding-window layers keep their window, as in Transformers' own cache; linear-attention layers
    keep their state. Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        offload: str | None = None,
        device_pages: int | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise refused("config", type(config).__name__, "the model's config (`model.config`)")
        if offload is not None and offload not in OFFLOADS:
            raise refused("offload", repr(offload), f"None | {' | '.join(OFFLOADS)}")
        enough = type(device_pages) is int and device_pages >= 2
        if not (device_pages is None if offload is None else enough):
            allowed = "an integer >= 2 with `offload`, None without"
            raise refused("device_pages", repr(device_pages), allowed)
        if not _at_defaults(others):
            allowed = 'the defaults of `DynamicCache` (`offload="cpu"` keeps pages in host memory)'
            raise refused(", ".join(others), ", ".join(map(repr, others.values())), allowed)
        super().__init__(config=config, **others)
        self.config = config.get_text_config(decoder=True)
        # which part of the heads this process holds, and of how many, by the model's own config;
        # None: all. The processes that share the heads of one model are neighbours.
        processes = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        rank = torch.distributed.get_rank() if processes > 1 else 0
        self.shard = (rank % processes, processes) if processes > 1 else None
        self.offload_to, self.device_pages = offload, device_pages
        self._in_model = False  # whether a model uses it, which brings every layer the same tokens
        # of the model's present call the last update: layer, the tokens it held, and how many came
        self._last_update: tuple[int, int, int] | None = None
        # which call has left it with a part of its tokens, if one has
        self._spoiled: str | None = None
        self.layers = [self.make_layer(layer) for layer in self.layers]

    def make_layer(self, made: Any) -> Any:
        """An empty layer in pages for one of full attention that Transformers made; else that."""
        if type(made) is DynamicLayer:
            return PagedLayer(self.config, self.offload_to, self.device_pages)
        if type(made) is LinearAttentionAndFullAttentionLayer:
            return PagedHybridLayer(made, self.config, self.offload_to, self.device_pages)
        return made

    def statistics(self) -> Statistics:
        """Hits, misses and bytes moved of the device pools, by reader, over all layers. Raises
        ValueError if the cache is not offloaded."""
        if self.offload_to is None:
            raise refused("offload", "None", "cpu | disk (a resident cache has no device pools)")
        pools = [layer.pool for layer in self.paged if layer.pool is not None]
        stores: list[Any] = [store for pool in pools for store in (pool.keys, pool.values)]
        each = [store.pool.traffic for store in stores]
        return Statistics({name: sum((one[name] for one in each), Traffic()) for name in READERS})

    def save(self, path: str | os.PathLike[str], *, made_of: dict[str, Any] | None = None) -> None:
        """Write the cache to one safetensors file, atomically: the file is the old one or the new
        one, whatever happens.

        Summaries are rebuilt from the keys when the cache is used again; a resumed decode selects
        anew at its first step. With tensor parallelism each process saves the heads that it holds,
        to a file of its own.

        Args:
            made_of: what the contents were computed from (a digest of the tokens, settings ...), as
                JSON; `load` compares it.

        Raises:
            ValueError: a layer that is neither full attention nor sliding-window, or a cache on
                which a call has failed.
            OSError: the disk is full or `path` cannot be written.
        """
        self._check_usable()
        tensors, layers = {}, []
        layer: Any
        for index, layer in enumerate(self.layers):
            kind, length = _file_kind(layer), int(layer.get_seq_length())
            unrotated = kind == "paged" and layer.unrotated
            layers.append({"kind": kind, "length": length, "unrotated": unrotated})
            for name in ("keys", "values") if layer.is_initialized else ():
                if kind == "paged":
                    held = getattr(layer.pool, name)
                    shape = torch.Size((len(layer.tables), held.heads, layer.length, held.dim))
                    parts: Any = files.paged_parts(held, layer.tables, layer.length)
                else:
                    held = getattr(layer, name)
                    shape, parts = held.shape, [held]
                tensors[f"{index}.{name}"] = shape, held.dtype, parts
        facts = {"model": self._model(), "layers": layers, "made_of": made_of or {}}
        files.write_tensors(Path(path), facts, tensors)

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        made_of: dict[str, Any] | None = None,
    ) -> None:
        """Replace the contents by those of a file that `save` wrote.

        Args:
            device: that of the model.
            made_of: what the contents must have been computed from, as it was given to `save`.
                None: anything.

        Raises:
            ValueError: a broken or foreign file, of another model or heads, or made of something
                else. The cache is as it was.
            FileNotFoundError: there is no such file.
            MemoryError: no memory for its pages. The cache is as it was.
        """
        path, model, target = Path(path), self._model(), torch.device(device)
        with files.reading(path) as (file, facts):
            if facts["model"] != model:
                got = f"a cache of {json.dumps(facts['model'])}"
                raise files.refused_file(path, got, f"one of this model, {json.dumps(model)}")
            made, wanted = facts.get("made_of", {}), json.loads(json.dumps(made_of))  # as in a file
            for name in {} if wanted is None else {**wanted, **made}:
                got, asked = made.get(name), wanted.get(name)
                if got != asked:
                    raise files.refused_file(
                        path, f"a cache made with {name}={got!r}", f"{name}={asked!r}"
                    )
            kinds, saved = [_file_kind(layer) for layer in self.layers], facts["layers"]
            found = [layer["kind"] for layer in saved]
            if found != kinds:
                raise files.refused_file(path, f"layers {found}", f"{kinds}, as this model has")
            names = set(file.keys())
            fresh: list[Any] = []
            layer: Any
            for index, (layer, known) in enumerate(zip(self.layers, saved, strict=True)):
                paged = known["kind"] == "paged"
                own = DynamicLayer() if paged else DynamicSlidingWindowLayer(layer.sliding_window)
                fresh.append(self.make_layer(own))
                if f"{index}.keys" in names:
                    keys, values = (
                        file.get_slice(f"{index}.{name}") for name in ("keys", "values")
                    )
                    _fill(fresh[-1], keys, values, known, target)
        self.layers[:] = fresh
        self._last_update = self._spoiled = None

    def _model(self) -> dict[str, Any]:
        """What must agree for a saved cache to make sense to a model."""
        names = ["model_type", "num_hidden_layers", "hidden_size", "num_attention_heads"]
        names += ["num_key_value_heads", "head_dim"]
        model = {name: getattr(self.config, name, None) for name in names}
        # of tensor parallelism, which heads are held; a whole cache does not say that it is
        return model if self.shard is None else {**model, "shard": list(self.shard)}

    @property
    def paged(self) -> list[PagedLayer]:
        """The layers that are in pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, n, D]` to one layer, and return what it says that attention should read.
        If that fails where other layers have the call's tokens already, the cache is unusable.
        Raises MemoryError and ValueError as `PagedLayer.update`, and ValueError if it is so."""
        if torch.compiler.is_compiling():
            given = (key_states, value_states, layer_idx, *args)
            return outside_of_graphs(HiPCache.update, self, *given, **kwargs)
        now = self._check(layer_idx, key_states.shape[2])
        try:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException as error:
            self._failed(layer_idx, error)
            raise
        self._last_update = now
        setattr(keys, CACHE, self)
        newest.cache = weakref.ref(self)
        return keys, values

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> None:
        """Append `[B, Hkv, n, D]` to one paged layer, as `update` does, for a caller who reads it
        elsewhere."""
        layer: Any = self.layers[layer_idx]
        now = self._check(layer_idx, key_states.shape[2])
        try:
            layer.check(key_states, value_states)
            layer.append(key_states, value_states)
        except BaseException as error:
            self._failed(layer_idx, error)
            raise
        self._last_update = now

    def _failed(self, layer_idx: int, error: BaseException) -> None:
        """Note that an update of a layer has failed. That layer is as it was, unless it was
        interrupted while it appended. (No context manager: an interrupt between its frames and the
        caller's would go unnoticed.)"""
        layers: list[Any] = self.layers[: layer_idx + 1]
        running = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
        half = any(layer.appending for layer in layers if isinstance(layer, PagedLayer))
        if self._last_update is not None or half or (self._in_model and running):
            self.spoil(error)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in Transformers' own cache; a model asks for it at the beginning of every call. Raises
        ValueError, before a layer has been touched, if the cache is unusable."""
        self._check_usable()
        self._in_model, self._last_update = True, None
        return super().get_mask_sizes(*args, **kwargs)

    def reset(self) -> None:
        """Forget everything: the cache is as a new one."""
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):  # Transformers 5.17 keeps zeros in it
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()
        self._last_update = self._spoiled = None

    def spoil(self, error: BaseException) -> None:
        """Be unusable until `reset`: a call of the model has failed with `error` after layers got
        its tokens."""
        self._spoiled = f"that holds a part of a call which failed ({type(error).__name__})"

    def _check_usable(self) -> None:
        """Raise ValueError if a call has failed on this cache."""
        if self._spoiled is not None:
            raise unusable(self._spoiled)

    def _check(self, layer_idx: int, rows: int) -> tuple[int, int, int] | None:
        """The layer, the tokens that it holds and those that come, for the next layer to compare
        with; None outside of a model. Raises ValueError if the cache is unusable: a call has failed
        on it, or was interrupted between two layers, so that this one does not hold what the one
        before it held when it got as many new tokens."""
        self._check_usable()
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not self._in_model or not isinstance(layer, DynamicLayer):
            return self._last_update
        # a sliding layer that assisted decoding of 5.17 has cropped gives a tensor that will change
        length = int(layer.get_seq_length())
        if self._last_update is not None:
            above, held, came = self._last_update
            if above < layer_idx and came == rows and held != length:
                what = f"whose layers hold {held} and {length} tokens"
                self._spoiled = f"{what}, as an interrupted call left them"
                self._check_usable()
        return layer_idx, length, rows

    def __deepcopy__(self, memo: dict[int, Any]) -> HiPCache:
        """A copy with pages of its own; the model's config stays the model's."""
        memo[id(self.config)] = self.config
        memo[id(self)] = other = copy.copy(self)
        other.__dict__ = copy.deepcopy(vars(self), memo)
        return other


def _at_defaults(arguments: dict[str, Any]) -> bool:
    """Whether all arguments have the defaults of `DynamicCache`. Unknown arguments do not."""
    defaults = inspect.signature(DynamicCache.__init__).parameters
    values = {name: parameter.default for name, parameter in defaults.items()}
    return all(name in values and values[name] is x for name, x in arguments.items())


def _file_kind(layer: Any) -> str:
    """`paged` or `sliding`. Raises ValueError for a layer that no file can hold: a layer in pages
    says itself whether one can."""
    if type(layer) is DynamicSlidingWindowLayer:
        return "sliding"
    if isinstance(layer, PagedLayer) and layer.in_files:
        return "paged"
    allowed = "full-attention and sliding-window layers"
    raise refused("cache", f"a {type(layer).__name__}", allowed)


def _fill(layer: Any, keys: Any, values: Any, known: dict[str, Any], device: torch.device) -> None:
    """Give an empty layer what the file's slices `[B, Hkv, T, D]` hold. `known`: what the file says
    of the layer."""
    length = known["length"]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.lazy_initialization(*(x[:, :, :0].to(device) for x in (keys, values)))
        layer.keys, layer.values = keys[:].to(device), values[:].to(device)
        layer.cumulative_length = length
        return
    for first in range(0, length, files.TOKENS_AT_ONCE):
        part = slice(first, min(first + files.TOKENS_AT_ONCE, length))
        layer.append(keys[:, :, part].to(device), values[:, :, part].to(device))
    layer.unrotated = known.get("unrotated", False)


def _new_dynamic_cache(cls: type, *args: Any, **kwargs: Any) -> Any:
    """`DynamicCache.__new__`: the cache made from the config of a `hip` model, and from nothing
    else, is a `HiPCache`."""
    config = kwargs.pop("config", None)  # of a dict of our own
    plain = cls is DynamicCache and not args and config is not None and _at_defaults(kwargs)
    if plain and attends_by_us(config.get_text_config(decoder=True)):
        cls = HiPCache
    return object.__new__(cls)


def install_caches() -> None:
    """Let caches be these: the dynamic cache made from a model's config a `HiPCache`, and the
    full-attention layers of a static cache layers with a decode state."""
    replaced = {
        StaticLayer: HiPStaticLayer,
        LinearAttentionAndStaticFullAttentionLayer: HiPHybridStaticLayer,
    }
    mapping = cache_utils.STATIC_LAYER_TYPE_MAPPING
    for name, layer in list(mapping.items()):
        if layer in replaced:
            set_item(mapping, name, replaced[layer])
    if "__new__" not in vars(DynamicCache):
        # what a class once had in this place cannot be deleted: `object.__new__` would refuse all
        # arguments ever after
        DynamicCache.__new__ = lambda cls, *_, **__: object.__new__(cls)  # type: ignore
    set_attribute(DynamicCache, "__new__", _new_dynamic_cache)
