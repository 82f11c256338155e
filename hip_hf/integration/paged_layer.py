"""The layers of a `HiPCache` that keep keys and values in pages, beside them the pyramid and the
selection (`DecodeState`)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from hip_hf.backends.choice import asks_for_kernels
from hip_hf.cache.offload import OffloadedStore
from hip_hf.cache.pages import BlockTable, PagedTensor, Store, read_all
from hip_hf.cache.pool import PAGE, PagePool
from hip_hf.integration.cache_layers import CUT_OFF, KIND, Stateful, cut_off, unusable
from hip_hf.integration.extension import UNROTATED, check_extension, extends, rope_of
from hip_hf.integration.settings import attends_by_us, read_settings
from hip_hf.rope import Rope
from hip_hf.shown import refused


def _gathered(name: str) -> Any:
    """A property: all `keys` or `values` as an ordinary tensor `[B, Hkv, T, D]`, gathered now; None
    while there are none, which is all that it can be set to."""

    def read(layer: PagedLayer) -> torch.Tensor | None:
        pool = layer.pool
        return None if pool is None else read_all(getattr(pool, name), layer.tables, layer.length)

    def refuse(layer: PagedLayer, value: torch.Tensor | None) -> None:
        if value is not None:
            got = type(value).__name__
            raise refused("keys, values", got, "`update` (the cache is in pages)")

    return property(read, refuse)


class PagedLayer(Stateful, DynamicLayer):
    """One full-attention layer in pages. The model's `config` decides what `update` returns."""

    in_files = True  # whether all that it keeps is what a file holds of a layer in pages
    keys, values = _gathered("keys"), _gathered("values")

    def __init__(
        self, config: PreTrainedConfig, offload: str | None = None, device_pages: int | None = None
    ) -> None:
        self.config, self.offload_to, self.device_pages = config, offload, device_pages
        self.pool: PagePool | None = None
        self.tables: list[BlockTable] = []
        self.length = 0
        self.cut_off = False  # whether gradients were asked for through what is kept
        self.appending = False  # or a call was interrupted while it did
        self.unrotated = False  # whether the keys are as they were before RoPE
        self.rope: Rope | None = None  # of the model, once keys have had to be rotated back
        super().__init__()

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
            one_piece = asks_for_kernels(settings, keys.device)
            return PagePool(Store(*sizes[0]), Store(*sizes[1]), one_piece)
        recent = -(-settings.window // PAGE) + 2
        # the search reads keys as well
        keys_on_device = 2 * self.device_pages
        key_store = OffloadedStore(*sizes[0], self.offload_to, keys_on_device, recent)
        value_store = OffloadedStore(*sizes[1], self.offload_to, self.device_pages, recent)
        return PagePool(key_store, value_store)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, Hkv, n, D]`. Returns all keys and values: handles to pages for a model that
        attends by `hip`, else ordinary tensors. (Gradients flow through the first tokens' call
        alone: a backward pass through a later one raises.) Raises ValueError for tensors that do
        not continue what is cached, or keys of another `extend`, and MemoryError if there is no
        memory for more pages. Nothing has changed then."""
        self.check(key_states, value_states)
        kept = getattr(key_states, UNROTATED, None)
        if kept is None and extends(self.config) and attends_by_us(self.config):
            # keys of a layer that is not patched, where settings extend the context
            if self.rope is None:
                check_extension(read_settings(self.config), self.config)
                self.rope = rope_of(self.config, key_states.shape[-1])
            key_states, kept = self.rope.unrotate(key_states, self.length), True
        if self.length and bool(kept) != self.unrotated:
            now, before = ("'streaming'", None) if kept else (None, "'streaming'")
            got = f"a cache filled with extend={before}"
            allowed = f"with extend={now} an empty one, or one filled so"
            raise refused("past_key_values", got, allowed)
        self.unrotated, first = bool(kept), self.length == 0
        self.append(key_states, value_states)
        assert self.pool is not None
        stores = (self.pool.keys, self.pool.values)
        if first:  # all there is has just come: no need to look for it in pages
            keys, values = key_states, value_states
        elif attends_by_us(self.config):
            keys, values = (PagedTensor(store, self.tables, self.length) for store in stores)
        else:
            keys, values = self.keys, self.values
            if self.cut_off and torch.is_grad_enabled():
                keys, values = cut_off(keys), cut_off(values)
        return self.stated(keys), values

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Keep `[B, Hkv, n, D]` as they are. Raises ValueError or MemoryError as `update` does."""
        if self.appending:
            raise unusable("with tokens that are half there")
        if self.device_pages is not None:
            # the blocks which one step selects for a head must find room, at worst each in a page
            # of its own (the search looks at more, but in as many goes as its pool asks for)
            settings = read_settings(self.config)
            pages = -(-(self.length + key_states.shape[2]) // PAGE)
            need = min(settings.selected_keys // settings.block_k, pages)
            if self.device_pages < need:
                allowed = f"at least {need}, the pages one step may need"
                raise refused("device_pages", f"{self.device_pages}", allowed)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.pool is not None
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self.cut_off = True
            key_states, value_states = key_states.detach(), value_states.detach()
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

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise ValueError for keys and values `[B, Hkv, n, D]` that do not continue what is
        cached."""
        if self.pool is None:
            return
        stores = (("key_states", keys, self.pool.keys), ("value_states", values, self.pool.values))
        for name, x, store in stores:
            got = (x.shape[0], x.shape[1], x.shape[3], x.dtype)
            want = (len(self.tables), store.heads, store.dim, store.dtype)
            if got != want:
                raise refused(name, f"(batch, heads, dim, dtype) {got}", f"{want}, as cached")

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.pool, self.tables, self.length, self.is_initialized = None, [], 0, False
        self.cut_off = self.appending = False
        self.hip_state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` tokens from the end. Raises ValueError for a positive count,
        which Transformers has once taken for the length to keep."""
        if tokens_to_remove > 0:
            allowed = "minus the number of tokens to remove, or 0"
            raise refused("tokens_to_remove", f"{tokens_to_remove}", allowed)
        if self.pool is None or tokens_to_remove == 0:
            return
        # assisted decoding of 5.17 gives a tensor
        self.length = max(0, self.length + int(tokens_to_remove))
        for table in self.tables:
            self.pool.truncate(table, self.length)
        self.hip_state.crop(self.length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

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
    """A layer with full attention in pages and the running state of linear attention or of a
    convolution beside them. `made`: the layer that Transformers would use, which says what running
    states there are.
    """

    in_files = False
    is_compileable = False

    def __init__(self, made: LinearAttentionAndFullAttentionLayer, *args: Any) -> None:
        PagedLayer.__init__(self, *args)
        for name, value in vars(made).items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the pages for keys and values, which come by position; of a running state, which comes
        by name."""
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
