"""Continuous batching: Transformers' own paged cache, read through its pages.

A call brings the new tokens of several requests, packed into one row: whole prompts, parts of prompts, single decoded tokens.
Each request attends by itself, to keys picked out of its pages; nothing is gathered. Decode state is kept with the cache, by the
page that holds a request's last token, and believed only by who has the same pages, with the same key for that token (pages
are also copied and restored behind our back). A call that writes to a page ends the state of whoever had it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import transformers

from hip_hf.attention import Result, attend
from hip_hf.backends.keys_read import Count, share_of
from hip_hf.cache.pages import BlockTable, Lane, PagedTensor, Store
from hip_hf.config import HiPConfig
from hip_hf.integration.changes import at_undo, set_attribute
from hip_hf.integration.names import attends_by_us
from hip_hf.integration.packed import Forward, Kept, Place, find_place, forward_of, states_of
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.state import DecodeState

GATE = "transformers.generation.continuous_batching.continuous_api"
CACHE_OF_KEYS = "_hip_paged_cache"  # attribute of a layer's new keys: the paged cache that was asked to take them


class TokenMajorStore(Store):
    """Keys (or values) as Transformers keeps them, `[tokens, Hkv, D]`: a page holds all heads of a token side by side."""

    def __init__(self, rows: torch.Tensor, page: int) -> None:
        super().__init__(rows.shape[1], rows.shape[2], rows.dtype, rows.device, page)
        self.slabs, self.bounds = [rows], [0]

    def read(self, heads: slice, table: BlockTable, first: int, last: int) -> torch.Tensor:
        parts = []
        for page, offset, count in self.pieces(table, first, last):
            at = page * self.page + offset
            parts.append(self.slabs[0][at : at + count, heads].transpose(0, 1))
        if not parts:
            return self.slabs[0][:0, heads].transpose(0, 1)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unit(self, start: int, block: int) -> int:
        return 1

    def pages(self) -> torch.Tensor:
        whole = len(self.slabs[0]) // self.page * self.page
        return self.slabs[0][:whole].unflatten(0, (-1, self.page))

    def index(self, heads: slice, table: BlockTable, unit: torch.Tensor, size: int) -> torch.Tensor:
        token = super().index(heads, table, unit, size)
        head = torch.arange(heads.start, heads.stop, device=token.device)
        return token * self.heads + head.view(-1, *[1] * (token.ndim - 1))

    def lanes(self, heads: slice, size: int) -> list[Any]:
        return [Lane(self.slabs[0].view(-1, self.dim))] * (heads.stop - heads.start)


def continuous(problem: AttentionProblem, config: HiPConfig, layer: int, cache: Any, kwargs: dict[str, Any]) -> Result:
    """Attention of packed requests: q, k and v of `problem` hold the new tokens, `[1, H, new tokens, D]`.

    Raises:
        ValueError: a cache of an unknown layout.
    """
    if kwargs.get("block_table") is not None:
        raise ValueError("block_table: got a table, allowed: None (the decode path of flash attention)")
    place, forward = find_place(cache, layer), forward_of(cache, layer, kwargs)
    requests = forward.requests[place.kind]
    if place.keys is None or place.values is None:
        k, v = _ring(cache, problem, layer, kwargs)
    else:
        k, v = problem.k, problem.v
        write = kwargs["write_index"][place.group]
        for stored, new in ((place.keys, k), (place.values, v)):
            stored.index_copy_(0, write[: new.shape[2]], new[0].transpose(0, 1))
    out, result = problem.q.new_zeros(*problem.q.shape[:3], problem.v.shape[-1]), None
    paths, counts, reason, unsupported = set(), [], "", False
    states = _states_before(cache, layer, place, forward) if place.keys is not None else []
    for i, request in enumerate(requests):
        q = problem.q[:, :, request.row : request.row_end]
        own: tuple[torch.Tensor, torch.Tensor]
        if place.keys is None or place.values is None:
            own = k[:, :, request.key : request.key_end], v[:, :, request.key : request.key_end]
        elif request.before:
            table = [forward.tables[place.group][i]]
            own = tuple(PagedTensor(TokenMajorStore(x, place.page), table, request.keys) for x in (place.keys, place.values))  # type: ignore[assignment]
        else:
            own = k[:, :, request.row : request.row_end], v[:, :, request.row : request.row_end]
        one = replace(problem, q=q, k=own[0], v=own[1], spans=make_spans(q, own[0]))
        state = states[i] if states else None
        result = attend(one, config, layer, state)
        out[:, :, request.row : request.row_end] = result.out
        if state is not None:
            _keep_state(cache, layer, place, forward.tables[place.group][i], request.keys, state)
        paths.add(result.path)
        counts.append(result.count)
        reason, unsupported = result.reason or reason, result.unsupported or unsupported
    path = "sparse" if "sparse" in paths else "dense"
    count = functools.partial(_each_alike, counts)
    return Result(out, None, None, path, reason, count, unsupported)


def _each_alike(counts: list[Count | None]) -> tuple[float, float]:
    """A count in which every request weighs as much, whatever its length."""
    return sum(map(share_of, counts)), max(1, len(counts))


def _ring(cache: Any, problem: AttentionProblem, layer: int, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Keys and values of a sliding layer, past and new, `[1, Hkv, keys, D]`: the cache itself unrolls its ring buffers."""
    update, indexed = _updates[type(cache)]
    if indexed:
        found = update(cache, problem.k, problem.v, layer, kwargs["read_index"], kwargs["write_index"])
    else:
        found = update(cache, problem.k, problem.v, layer, dict(kwargs))
    return [x.transpose(0, 1)[None] if x.ndim == 3 else x for x in found]


def _states_before(cache: Any, layer: int, place: Place, forward: Forward) -> list[DecodeState]:
    """The state of each request, a new one where none is believed. What else was kept by pages that this call writes to is
    forgotten."""
    kept, states = states_of(cache, layer), []
    requests, tables = forward.requests[place.kind], forward.tables[place.group]
    for one, table in zip(requests, tables, strict=True):
        found = kept.pop(table.pages[(one.before - 1) // place.page], None) if one.before else None
        believed = (
            found is not None
            and table.pages[: len(found.pages)] == found.pages
            and (layer, place.row(table, one.before - 1)) in forward.unchanged
        )
        states.append(found.state if found is not None and believed else DecodeState())
    for one, table in zip(requests, tables, strict=True):
        for page in table.pages[one.before // place.page :]:
            kept.pop(page, None)
    return states


def _forget_request(cache: Any, request: str) -> None:
    """Drop what is kept by the pages of a request that leaves the cache. Its summaries are as long as the request was, and its
    last page may wait long for another one."""
    for layer, kept in cache.__dict__.get("_hip_states", {}).items():
        for page in _pages_of(cache, layer, request):
            kept.pop(page, None)


def _pages_of(cache: Any, layer: int, request: str) -> list[int]:
    """The pages of a request in a layer, as `BlockTable` counts them."""
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        stride = allocator.block_physical_stride // allocator.tokens_per_page
        return [block * stride for block in allocator.block_table.get(request, ())]
    return cache.group_cache_managers[cache.layer_index_to_group_indices[layer][0]].block_table.get(request, [])


def _keep_state(cache: Any, layer: int, place: Place, table: BlockTable, tokens: int, state: DecodeState) -> None:
    assert place.keys is not None
    mark = place.keys[place.row(table, tokens - 1)].clone()
    states_of(cache, layer)[table.pages[-1]] = Kept(state, table.pages, mark)


# Transformers admits only its own attentions to continuous batching, or swaps ours for flash attention where that is installed.
# The classes are made long after `import hip_hf`, hence the hook on their module's import.

# Transformers' class of paged caches, once it is imported: its own `update`, and whether that takes indices (up to 5.17).
_updates: dict[type, tuple[Callable[..., Any], bool]] = {}
_packing = threading.local()  # `on` in the thread that runs the packed calls of a model of ours


def open_gate(module: ModuleType) -> None:
    """Let models that attend by us into continuous batching as they are, with their new tokens left to our attention."""
    try:
        manager, cache = module.ContinuousBatchingManager, module.PagedAttentionCache
        switch, loop = manager.switch_to_cb_friendly_attn, manager._run_generation_loop
        update, free = cache.update, cache.free_blocks
    except AttributeError:  # a version that is not known: the gate stays shut, which is an error for models of ours
        return
    if cache in _updates:
        return
    _updates[cache] = update, "read_index" in inspect.signature(update).parameters

    @functools.wraps(switch)
    def switched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return None if attends_by_us(model.config) else switch(self, model, *args, **kwargs)

    @functools.wraps(loop)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _packing.on = True
        return loop(self, *args, **kwargs)

    @functools.wraps(update)
    def left_to_attention(self: Any, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not attends_by_us(self.config):
            return update(self, key_states, value_states, layer_idx, *args, **kwargs)
        setattr(key_states, CACHE_OF_KEYS, self)
        return key_states, value_states

    @functools.wraps(free)
    def freed(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        _forget_request(self, request_id)
        return free(self, request_id, *args, **kwargs)

    at_undo(_updates.clear)
    set_attribute(manager, "switch_to_cb_friendly_attn", switched)
    set_attribute(manager, "_run_generation_loop", run)
    set_attribute(cache, "update", left_to_attention)
    set_attribute(cache, "free_blocks", freed)


def is_paged(value: Any) -> bool:
    """Whether this is Transformers' paged cache."""
    return isinstance(value, tuple(_updates))


def cache_of(key: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """The paged cache behind a layer's call, None if it is of no continuous batching. `arguments`: the others of the attention
    function. Up to Transformers 5.23 the cache is among them; later the layer itself updates it, and `key` knows.

    Raises:
        ValueError: packed requests have come in a way that is not known.
    """
    cache = getattr(key, CACHE_OF_KEYS, None) or next(filter(is_paged, arguments.values()), None)
    if cache is None and getattr(_packing, "on", False):
        raise ValueError(
            f"continuous batching: Transformers {transformers.__version__} brings no paged cache that is known here; allowed: "
            "`generate`, or a version that `hip_hf` was tested with"
        )
    return cache


class _Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != GATE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            open_gate(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Open the gate, now or when Transformers' module is imported. Harmless when called again."""
    if any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return
    module = sys.modules.get(GATE)
    if module is None:
        sys.meta_path.insert(0, hook := _Hook())
        at_undo(lambda: sys.meta_path.remove(hook) if hook in sys.meta_path else None)
    else:
        open_gate(module)
