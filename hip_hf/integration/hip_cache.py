"""`HiPCache`: a Transformers cache whose full-attention layers keep keys and values in pages.

A token is appended in place: no copy and no allocation that grows with the context. Beside the pages lie the pyramid and the
selection (`DecodeState`), so that selecting never rereads the keys. Sequences share pages by reference (beam search, repeated
prompts); the last page is copied before one of them continues it.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hip_hf.cache.offload import OFFLOADS, OffloadedStore, Statistics, statistics
from hip_hf.cache.pages import BlockTable, PagedTensor, Store, read_all
from hip_hf.cache.pool import PAGE, PagePool
from hip_hf.integration.cache_layers import CUT_OFF, KIND, Stateful, at_defaults, cut_off, outside_of_graphs
from hip_hf.integration.extension import UNROTATED, check_extension, extends, mixed_keys, rope_of
from hip_hf.integration.settings import attends_by_us, read_settings
from hip_hf.integration.undo import all_or_none, unfinished
from hip_hf.registry import selected_keys
from hip_hf.rope import Rope


class PagedLayer(Stateful, DynamicLayer):
    """One full-attention layer in pages. `config` is the model's: its attention decides what `update` returns."""

    def __init__(self, config: PreTrainedConfig, offload: str | None = None, device_pages: int | None = None) -> None:
        self.config, self.offload_to, self.device_pages = config, offload, device_pages
        self.pool: PagePool | None = None
        self.tables: list[BlockTable] = []
        self.length = 0
        self.cut_off = False  # whether gradients were asked for through what is kept
        self.appending = False  # or a call was interrupted while it did
        self.unrotated = False  # whether the keys are as they were before RoPE
        self.rope: Rope | None = None  # of the model, once keys have had to be turned back
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys as an ordinary tensor `[B, Hkv, T, D]`, gathered now; None while there are none."""
        return None if self.pool is None else read_all(self.pool.keys, self.tables, self.length)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._only_none(value)

    @property
    def values(self) -> torch.Tensor | None:
        """All values as an ordinary tensor `[B, Hkv, T, Dv]`, gathered now; None while there are none."""
        return None if self.pool is None else read_all(self.pool.values, self.tables, self.length)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._only_none(value)

    def _only_none(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise ValueError(f"keys, values: got {type(value).__name__}, allowed: `update` (the cache is in pages)")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.pool = self.make_pool(key_states, value_states)
        self.tables = [BlockTable() for _ in key_states]
        self.is_initialized = True

    def make_pool(self, keys: torch.Tensor, values: torch.Tensor) -> PagePool:
        """An empty pool for tensors like these."""
        settings = read_settings(self.config)
        sizes = [(x.shape[1], x.shape[3], x.dtype, x.device, PAGE) for x in (keys, values)]
        if self.offload_to is None or self.device_pages is None:
            one_piece = settings.backend == "triton" or (settings.backend == "auto" and keys.device.type == "cuda")
            return PagePool(Store(*sizes[0]), Store(*sizes[1]), one_piece)
        recent = -(-settings.window // PAGE) + 2
        # the search reads keys as well
        key_store = OffloadedStore(*sizes[0], self.offload_to, 2 * self.device_pages, recent)
        return PagePool(key_store, OffloadedStore(*sizes[1], self.offload_to, self.device_pages, recent))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, n, D]`. Returns all keys and values: handles to pages for attention of ours, else ordinary tensors.

        Raises:
            ValueError: tensors that do not continue what is cached, or keys of another `extend` than those cached. Nothing has
                changed. (Gradients flow through the first tokens' call alone: a backward pass through a later one raises.)
            MemoryError: no memory for more pages. Nothing has changed.
        """
        self.check(key_states, value_states)
        key_states, self.unrotated = self._as_kept(key_states)
        first = self.length == 0
        self.append(key_states, value_states)
        assert self.pool is not None
        if first:  # all there is has just come: no need to look for it in pages
            keys, values = key_states, value_states
        elif attends_by_us(self.config):
            keys, values = (PagedTensor(store, self.tables, self.length) for store in (self.pool.keys, self.pool.values))
        else:
            keys, values = (read_all(store, self.tables, self.length) for store in (self.pool.keys, self.pool.values))
            if self.cut_off and torch.is_grad_enabled():
                keys, values = cut_off(keys), cut_off(values)
        return self.stated(keys), values

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Keep `[B, Hkv, n, D]` as they are. Raises ValueError or MemoryError as `update` does."""
        if self.appending:
            raise unfinished("with tokens that are half there")
        self._check_device_pages(self.length + key_states.shape[2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.pool is not None
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self.cut_off, key_states, value_states = True, key_states.detach(), value_states.detach()
        self.appending = True
        try:
            self.pool.append(self.tables, self.length, key_states, value_states)
        except MemoryError:  # nothing has changed
            self.appending = False
            raise
        self.length, self.appending = self.length + key_states.shape[2], False

    def stated(self, keys: torch.Tensor) -> torch.Tensor:
        keys = super().stated(keys)
        setattr(keys, KIND, "pages")
        setattr(keys, CUT_OFF, self.cut_off)
        if self.unrotated:
            setattr(keys, UNROTATED, True)
        return keys

    def _as_kept(self, keys: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The keys as they will be kept, and whether that is without RoPE: where settings extend the context, keys of layers that
        are not patched are turned back."""
        kept = getattr(keys, UNROTATED, None)
        if kept is None and extends(self.config) and attends_by_us(self.config):
            if self.rope is None:
                check_extension(read_settings(self.config), self.config)
                self.rope = rope_of(self.config, keys.shape[-1])
            keys, kept = self.rope.unrotated(keys, self.length), True
        if self.length and bool(kept) != self.unrotated:
            raise mixed_keys(bool(kept))
        return keys, bool(kept)

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise ValueError for tensors that do not continue what is cached."""
        if self.pool is None:
            return
        for name, x, store in (("key_states", keys, self.pool.keys), ("value_states", values, self.pool.values)):
            got = (x.shape[0], x.shape[1], x.shape[3], x.dtype)
            want = (len(self.tables), store.heads, store.dim, store.dtype)
            if got != want:
                raise ValueError(f"{name}: got (batch, heads, dim, dtype) {got}, allowed: {want}, as cached")

    def _check_device_pages(self, length: int) -> None:
        """Refuse pools that could not hold the blocks which one step selects for a head. (The search looks at more, but it
        reads them in as many goes as its pool asks for.)"""
        if self.offload_to is None or self.device_pages is None:
            return
        settings = read_settings(self.config)
        selected = selected_keys(settings) // settings.block_k
        need = min(selected, -(-length // PAGE))  # at worst each block lies in a page of its own
        if self.device_pages < need:
            raise ValueError(f"device_pages: got {self.device_pages}, allowed: at least {need}, the pages one step may need")

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.pool, self.tables, self.length, self.is_initialized = None, [], 0, False
        self.cut_off = self.appending = False
        self.hip_state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` tokens from the end.

        Raises:
            ValueError: a positive count, which Transformers has once taken for the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, allowed: minus the number of tokens to remove, or 0")
        self.truncate(max(0, self.length + int(tokens_to_remove)))  # assisted decoding of 5.17 gives a tensor

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if self.pool is None or length >= self.length:
            return
        for table in self.tables:
            self.pool.truncate(table, length)
        self.length = length
        self.hip_state.crop(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.tables)) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        """Batch row `b` continues what row `rows[b]` was."""
        if self.pool is None:
            return
        before = self.tables
        self.tables = [self.pool.share(before[row]) for row in rows]
        for table in before:
            self.pool.release(table.pages)
        self.hip_state.reorder(rows)


class PagedHybridLayer(LinearAttentionLayer, PagedLayer):  # type: ignore[misc, override]
    """A layer with full attention in pages and the running state of linear attention or of a convolution beside them.

    Args:
        made: the layer that Transformers would use; it says which running states there are.
    """

    is_compileable = False

    def __init__(self, made: LinearAttentionAndFullAttentionLayer, *args: Any) -> None:
        PagedLayer.__init__(self, *args)
        for name, value in vars(made).items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the pages for keys and values, which come by position; of a running state, which comes by name."""
        if args:
            PagedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        PagedLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        PagedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        PagedLayer.crop(self, tokens_to_remove)


def shard_of(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Which part of a model's heads this process holds, and of how many, by its own config, not its text part's; None: all."""
    processes = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    # the processes that share the heads of one model are neighbours
    return None if processes == 1 else (torch.distributed.get_rank() % processes, processes)


class HiPCache(DynamicCache):
    """A Transformers cache in pages, for `past_key_values` of any model; what `generate` makes for a `hip` model.

    Args:
        config: the *model's* config (`model.config`), by which layers are laid out. Its `_attn_implementation` is read at
            every update: attention of ours gets handles to pages, any other gets ordinary tensors.
        offload: None; `cpu` keeps the pages in host memory, `disk` in a memory-mapped temporary file.
        device_pages: with `offload`, the pages of values that a layer holds on the device for every head; of keys, which the
            search reads as well as attention, it holds twice as many.
        others: further arguments of `DynamicCache`, by name, each at its default: some models make their caches with all of them.

    Sliding-window layers keep their window, as in Transformers' own cache; linear-attention layers keep their state.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(
        self, config: PreTrainedConfig, *, offload: str | None = None, device_pages: int | None = None, **others: Any
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config: got {type(config).__name__}, allowed: the model's config (`model.config`)")
        if offload is not None and offload not in OFFLOADS:
            raise ValueError(f"offload: got {offload!r}, allowed: None | {' | '.join(OFFLOADS)}")
        if (offload is None) != (device_pages is None) or (
            device_pages is not None and (type(device_pages) is not int or device_pages < 2)
        ):
            raise ValueError(f"device_pages: got {device_pages!r}, allowed: an integer >= 2 with `offload`, None without")
        if not at_defaults(others):
            allowed = 'the defaults of `DynamicCache` (`offload="cpu"` keeps pages in host memory)'
            raise ValueError(f"{', '.join(others)}: got {', '.join(map(repr, others.values()))}, allowed: {allowed}")
        super().__init__(config=config, **others)
        self.config = config.get_text_config(decoder=True)
        self.shard = shard_of(config)
        self.offload_to, self.device_pages = offload, device_pages
        self._in_model = False  # whether a model uses it, which brings every layer the same tokens
        self._last_update: tuple[int, int, int] | None = None  # layer, the tokens it held, and how many came
        self.layers = [self.make_layer(layer) for layer in self.layers]

    def make_layer(self, made: Any) -> Any:
        """An empty layer in pages in place of the one that Transformers made; that one where it has no full attention."""
        if type(made) is DynamicLayer:
            return PagedLayer(self.config, self.offload_to, self.device_pages)
        if type(made) is LinearAttentionAndFullAttentionLayer:
            return PagedHybridLayer(made, self.config, self.offload_to, self.device_pages)
        return made

    def statistics(self) -> Statistics:
        """Hits, misses and bytes moved of the device pools, by reader, over all layers.

        Raises:
            ValueError: the cache is not offloaded.
        """
        if self.offload_to is None:
            raise ValueError("offload: got None, allowed: cpu | disk (a resident cache has no device pools)")
        pools = [layer.pool for layer in self.paged if layer.pool is not None]
        return statistics([store for pool in pools for store in (pool.keys, pool.values)])  # type: ignore[misc]

    def save(self, path: str | os.PathLike[str], *, made_of: dict[str, Any] | None = None) -> None:
        """Write the cache to one safetensors file, atomically: the file is the old one or the new one, whatever happens.

        Summaries are rebuilt from the keys when the cache is used again; a resumed decode selects anew at its first step.
        With tensor parallelism each process saves the heads that it holds, to a file of its own.

        Args:
            made_of: what the contents were computed from (a digest of the tokens, settings ...), as JSON; `load` compares it.

        Raises:
            ValueError: a layer that is neither full attention nor sliding-window.
            OSError: the disk is full or `path` cannot be written.
        """
        from hip_hf.cache.files import save

        save(self, path, made_of or {})

    def load(
        self, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", made_of: dict[str, Any] | None = None
    ) -> None:
        """Replace the contents by those of a file that `save` wrote.

        Args:
            device: that of the model.
            made_of: what the contents must have been computed from, as it was given to `save`. None: anything.

        Raises:
            ValueError: a broken or foreign file, of another model or heads, or made of something else. The cache is as it was.
            FileNotFoundError: there is no such file.
            MemoryError: no memory for its pages. The cache is as it was.
        """
        from hip_hf.cache.files import load

        load(self, path, torch.device(device), made_of)

    @property
    def paged(self) -> list[PagedLayer]:
        """The layers that are in pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to one layer. If that fails, the layers before it give up their new tokens as well.

        Raises:
            MemoryError, ValueError: as `PagedLayer.update`; and where a sliding layer before it has forgotten what it held.
        """
        if torch.compiler.is_compiling():
            return outside_of_graphs(HiPCache.update, self, key_states, value_states, layer_idx, *args, **kwargs)
        self._check_lengths(layer_idx, key_states.shape[2])
        with all_or_none(self, layer_idx, key_states.shape[2], BaseException):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> None:
        """Append to one paged layer, as `update` does, for a caller who does not ask for the rest."""
        layer: Any = self.layers[layer_idx]
        self._check_lengths(layer_idx, key_states.shape[2])
        layer.check(key_states, value_states)
        with all_or_none(self, layer_idx, key_states.shape[2], BaseException):
            layer.append(key_states, value_states)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in Transformers' own cache; a model asks for it at the beginning of every call."""
        self._in_model, self._last_update = True, None
        return super().get_mask_sizes(*args, **kwargs)

    def _check_lengths(self, layer_idx: int, rows: int) -> None:
        """Raise ValueError for a layer that does not hold what the one before it held when it got as many new tokens: a call of
        the model was interrupted between the two, outside of attention, where nothing could take them back."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not self._in_model or not isinstance(layer, DynamicLayer):
            return
        # of a sliding layer that assisted decoding of 5.17 has cropped it is a tensor, and changes in place
        length, before = int(layer.get_seq_length()), self._last_update
        if before is not None and before[0] < layer_idx and before[2] == rows and before[1] != length:
            raise unfinished(f"whose layers hold {before[1]} and {length} tokens")
        self._last_update = (layer_idx, length, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> HiPCache:
        """A copy with pages of its own; the model's config stays the model's."""
        memo[id(self.config)] = self.config
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return other
