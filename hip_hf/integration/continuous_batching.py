"""Continuous batching: Transformers' own paged cache, read through its pages.

A call brings the new tokens of several requests, packed into one row: whole prompts, parts of
prompts, single decoded tokens. Each request attends by itself, to keys picked out of its pages;
nothing is gathered. Decode state is kept with the cache, by the page that holds a request's last
token. A request uses it only if it has the same pages, with the same key for that token, because
Transformers also copies and restores pages. A call that writes to a page drops what was kept by it.

What a forward brings is on the device. It is read once a forward, for all layers and requests, in
three waits. The cache's layout is not documented; it is found by inspection, and an unknown one
raises instead of computing garbage.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import transformers

from hip_hf.attention import Result, attend
from hip_hf.backends.keys_read import Count, density_of
from hip_hf.cache.pages import BlockTable, HeadRows, PagedTensor, Store
from hip_hf.config import HiPConfig
from hip_hf.integration.changes import at_undo, wrap
from hip_hf.integration.settings import attends_by_us
from hip_hf.problem import AttentionProblem, make_spans
from hip_hf.shown import refused
from hip_hf.state import DecodeState

GATE = "transformers.generation.continuous_batching.continuous_api"
FORWARD = "_hip_forward"  # attribute of a paged cache: the forward that it serves, or served last
# attribute of a layer's new keys: the paged cache that was asked to take them
CACHE_OF_KEYS = "_hip_paged_cache"


class TokenMajorStore(Store):
    """Keys (or values) as Transformers keeps them, `[tokens, Hkv, D]`: a token's heads together."""

    def __init__(self, rows: torch.Tensor, page: int) -> None:
        super().__init__(rows.shape[1], rows.shape[2], rows.dtype, rows.device, page)
        self.rows, self.arenas, self.bounds = rows, [rows.transpose(0, 1)], [0]

    def gather_size(self, start: int, block: int) -> int:
        return 1

    def pages(self) -> torch.Tensor:
        whole = len(self.rows) // self.page * self.page
        return self.rows[:whole].unflatten(0, (-1, self.page))

    def index(self, heads: slice, table: BlockTable, row: torch.Tensor, size: int) -> torch.Tensor:
        token = super().index(heads, table, row, size)
        head = torch.arange(heads.start, heads.stop, device=token.device)
        return token * self.heads + head.view(-1, *[1] * (token.ndim - 1))

    def head_rows(self, heads: slice, size: int) -> list[HeadRows]:
        return [HeadRows([self.rows.view(-1, self.dim)], [0])] * (heads.stop - heads.start)


@dataclass(frozen=True)
class Place:
    """Where a layer's tokens are in the cache. `stored`: keys and values, `[tokens, Hkv, D]` each;
    none of a ring buffer (sliding)."""

    kind: str
    group: int
    page: int = 0
    stored: tuple[torch.Tensor, ...] = ()

    def row(self, table: BlockTable, position: int) -> int:
        """The row of what is `stored` that holds a request's token."""
        return table.pages[position // self.page] * self.page + position % self.page


def find_place(cache: Any, layer: int) -> Place:
    """The layout of a layer. Raises ValueError for a cache of an unknown kind."""
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        if allocator.layer_type != "full_attention":
            return Place(allocator.layer_type, allocator.index)
        stored = tuple(allocator._kv_token_views[layer])
        return Place(allocator.layer_type, allocator.index, allocator.tokens_per_page, stored)
    if hasattr(cache, "layer_index_to_group_indices"):
        group, index = cache.layer_index_to_group_indices[layer]
        if cache.sliding_windows[layer] != 1:
            return Place("sliding_attention", group)
        stored = (cache.key_cache[index], cache.value_cache[index])
        return Place("full_attention", group, cache.block_size, stored)
    got = f"{type(cache).__name__} of an unknown layout"
    raise refused("cache", got, "Transformers' paged cache as tested")


class Request(NamedTuple):
    """Where a request's new tokens are in a call: rows of its queries, and keys among those of all
    requests, past and new."""

    row: int
    row_end: int
    key: int
    key_end: int

    @property
    def keys(self) -> int:
        """Tokens of the request, past and new."""
        return self.key_end - self.key

    @property
    def before(self) -> int:
        """Tokens of the request before this call."""
        return self.keys - (self.row_end - self.row)


@dataclass(frozen=True, eq=False)
class Kept:
    """A request's state, its pages, and the key `[Hkv, D]` of its last token."""

    state: DecodeState
    pages: list[int]
    mark: torch.Tensor


def states_of(cache: Any, layer: int) -> dict[int, Kept]:
    """What is kept for a layer, by the page of a request's last token."""
    return cache.__dict__.setdefault("_hip_states", {}).setdefault(layer, {})


def _fetch(parts: list[torch.Tensor]) -> list[list[Any]]:
    """What tensors of one dimension hold, on the host. The only place that waits for the device."""
    numbers = iter(torch.cat(parts).tolist() if parts else [])
    return [list(itertools.islice(numbers, len(part))) for part in parts]


class Forward:
    """What the index tensors of a forward say: the same to all of its layers, so it is read once.

    `requests`: those with new tokens, by kind of attention. `tables`: the pages of each, by group.
    `unchanged`: layers and rows of the cache where a kept state's mark was found. `given`: a tensor
    that the forward's layers share; `layer`: the last.
    """

    def __init__(self, cache: Any, kwargs: dict[str, Any]) -> None:
        layers = getattr(cache, "layer_to_allocator", None)
        places = {i: find_place(cache, i) for i in layers or cache.layer_index_to_group_indices}
        self.given, self.layer = kwargs["cu_seq_lens_q"], -1
        self.requests: dict[str, list[Request]] = self._read_requests(places, kwargs)
        self.tables = self._read_tables(places, kwargs)
        self.unchanged = self._read_marks(cache, places)

    def _read_requests(self, places: dict[int, Place], kwargs: Any) -> dict[str, Any]:
        """The requests that bring tokens, by kind of attention; others pad a call at its end."""
        kinds = dict.fromkeys(place.kind for place in places.values())
        keys = kwargs["cu_seq_lens_k"]
        bounds = [self.given, *(keys[kind] if isinstance(keys, dict) else keys for kind in kinds)]
        rows, *lengths = (list(itertools.pairwise(each)) for each in _fetch(bounds))
        requests = {}
        for kind, each in zip(kinds, lengths, strict=True):
            both = zip(rows, each, strict=True)
            requests[kind] = [Request(*row, *key) for row, key in both if row[0] < row[1]]
        return requests

    def _read_tables(self, places: dict[int, Place], kwargs: Any) -> dict[int, list[BlockTable]]:
        """The pages of each request, by group; of those that are no ring buffers."""
        groups, firsts = {place.group: place for place in places.values() if place.stored}, []
        for group, place in groups.items():
            read, write = kwargs["read_index"][group], kwargs["write_index"][group]
            for one in self.requests[place.kind]:
                tokens = read[one.key : one.key_end] if one.before else write[one.row : one.row_end]
                firsts.append(tokens[:: place.page])
        fetched = iter(_fetch(firsts))
        tables: dict[int, list[BlockTable]] = {}
        for group, place in groups.items():
            found = itertools.islice(fetched, len(self.requests[place.kind]))
            tables[group] = [BlockTable([token // place.page for token in one]) for one in found]
        return tables

    def _read_marks(self, cache: Any, places: dict[int, Place]) -> set[tuple[int, int]]:
        """Layers and rows of the cache that hold the last token of a request before this call, and
        still the key that they held when its state was kept."""
        asked, equal = [], []
        for layer, place in places.items():
            if not place.stored:
                continue
            kept, rows, marks = states_of(cache, layer), [], []
            for one, table in zip(self.requests[place.kind], self.tables[place.group], strict=True):
                last = one.before - 1
                found = kept.get(table.pages[last // place.page]) if one.before else None
                if found is not None:
                    rows.append(place.row(table, last))
                    marks.append(found.mark)
            if rows:
                asked += [(layer, row) for row in rows]
                now = torch.stack([place.stored[0][row] for row in rows])
                equal.append((now == torch.stack(marks)).flatten(1).all(1))
        return set(itertools.compress(asked, itertools.chain.from_iterable(_fetch(equal))))


def continuous(
    problem: AttentionProblem, config: HiPConfig, layer: int, cache: Any, kwargs: dict[str, Any]
) -> Result:
    """Attention of packed requests: q, k and v of `problem` hold the new tokens, `[1, H, tokens,
    D]`. Raises ValueError for a cache of an unknown layout."""
    if kwargs.get("block_table") is not None:
        raise refused("block_table", "a table", "None (the decode path of flash attention)")
    # The index tensors may be buffers that every forward fills anew, so the same tensors do not
    # make the same forward: a layer that is not above the last one begins another.
    place, forward = find_place(cache, layer), cache.__dict__.get(FORWARD)
    if forward is None or forward.given is not kwargs["cu_seq_lens_q"] or layer <= forward.layer:
        forward = cache.__dict__[FORWARD] = Forward(cache, kwargs)
    forward.layer = layer
    requests, stored = forward.requests[place.kind], place.stored
    given: Any = (problem.k, problem.v) if stored else _ring(cache, problem, layer, kwargs)
    for rows, new in zip(stored, given, strict=False):
        write = kwargs["write_index"][place.group]
        rows.index_copy_(0, write[: new.shape[2]], new[0].transpose(0, 1))
    out = problem.q.new_zeros(*problem.q.shape[:3], problem.v.shape[-1])
    paths, counts, reason = set(), [], ""
    states = _states_before(cache, layer, place, forward) if stored else []
    for i, request in enumerate(requests):
        new = slice(request.row, request.row_end)
        q, table = problem.q[:, :, new], forward.tables[place.group][i] if stored else BlockTable()
        if stored and request.before:
            stores = [TokenMajorStore(rows, place.page) for rows in stored]
            k, v = (PagedTensor(store, [table], request.keys) for store in stores)
        else:
            part = new if stored else slice(request.key, request.key_end)
            k, v = (x[:, :, part] for x in given)
        one = replace(problem, q=q, k=k, v=v, spans=make_spans(q, k))
        result = attend(one, config, layer, states[i] if stored else None)
        out[:, :, new] = result.out
        if stored:
            mark = stored[0][place.row(table, request.keys - 1)].clone()
            states_of(cache, layer)[table.pages[-1]] = Kept(states[i], table.pages, mark)
        paths.add(result.path)
        counts.append(result.count)
        reason = result.reason or reason
    path = "sparse" if "sparse" in paths else "dense"
    return Result(out, None, None, path, reason, functools.partial(_each_alike, counts))


def _each_alike(counts: list[Count | None]) -> tuple[float, float]:
    """A count in which every request weighs as much, whatever its length."""
    return sum(map(density_of, counts)), max(1, len(counts))


def _ring(
    cache: Any, problem: AttentionProblem, layer: int, kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Keys and values of a sliding layer, past and new, `[1, Hkv, keys, D]`: the cache itself
    unrolls its ring buffers."""
    update, indexed = _updates[type(cache)]
    rest = (kwargs["read_index"], kwargs["write_index"]) if indexed else (dict(kwargs),)
    found = update(cache, problem.k, problem.v, layer, *rest)
    return [x.transpose(0, 1)[None] if x.ndim == 3 else x for x in found]


def _states_before(cache: Any, layer: int, place: Place, forward: Forward) -> list[DecodeState]:
    """The state of each request, a new one where none is believed. What else was kept by pages that
    this call writes to is forgotten."""
    kept, states = states_of(cache, layer), []
    requests, tables = forward.requests[place.kind], forward.tables[place.group]
    for one, table in zip(requests, tables, strict=True):
        at = table.pages[(one.before - 1) // place.page]
        found: Any = kept.pop(at, None) if one.before else None
        believed = found is not None and table.pages[: len(found.pages)] == found.pages
        if believed and (layer, place.row(table, one.before - 1)) in forward.unchanged:
            states.append(found.state)
        else:
            states.append(DecodeState())
    for one, table in zip(requests, tables, strict=True):
        for page in table.pages[one.before // place.page :]:
            kept.pop(page, None)
    return states


def _forget_request(cache: Any, request: str) -> None:
    """Drop what is kept by the pages of a request that leaves the cache. Its summaries are as long
    as the request was, and its last page may wait long for another one."""
    for layer, kept in cache.__dict__.get("_hip_states", {}).items():
        if hasattr(cache, "layer_to_allocator"):
            manager = cache.layer_to_allocator[layer]
            stride = manager.block_physical_stride // manager.tokens_per_page
        else:
            group, _ = cache.layer_index_to_group_indices[layer]
            manager, stride = cache.group_cache_managers[group], 1
        for block in manager.block_table.get(request, ()):
            kept.pop(block * stride, None)


# Transformers admits only its own attentions to continuous batching, or swaps others for flash
# attention where that is installed.

# Transformers' class of paged caches, once the gate is open: its own `update`, and whether that
# takes indices (up to 5.18).
_updates: dict[type, tuple[Callable[..., Any], bool]] = {}
_packing = threading.local()  # `on` in the thread that runs the packed calls of such a model


def open_gate() -> None:
    """Let models that attend by `hip` into continuous batching as they are, with their new tokens
    left to the attention function. Harmless when called again."""
    module = importlib.import_module(GATE)  # as all of Transformers' models do
    manager = getattr(module, "ContinuousBatchingManager", None)
    cache: Any = getattr(module, "PagedAttentionCache", None)
    gate: list[tuple[Any, str, Callable[..., Any]]]
    gate = [(manager, "switch_to_cb_friendly_attn", _switch), (cache, "update", _update)]
    gate += [(manager, "_run_generation_loop", _run), (cache, "free_blocks", _free)]
    # in a version that is not known the gate stays shut, which is an error for such models
    if cache in _updates or not all(hasattr(owner, name) for owner, name, _ in gate):
        return
    _updates[cache] = cache.update, "read_index" in inspect.signature(cache.update).parameters
    at_undo(_updates.clear)
    for change in gate:
        wrap(*change)


def _switch(switch: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    return None if attends_by_us(model.config) else switch(self, model, *args, **kwargs)


def _run(loop: Any, *args: Any, **kwargs: Any) -> Any:
    _packing.on = True
    return loop(*args, **kwargs)


def _update(
    update: Any, self: Any, key_states: Any, value_states: Any, *args: Any, **kwargs: Any
) -> Any:
    if not attends_by_us(self.config):
        return update(self, key_states, value_states, *args, **kwargs)
    setattr(key_states, CACHE_OF_KEYS, self)
    return key_states, value_states


def _free(free: Any, self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
    _forget_request(self, request_id)
    return free(self, request_id, *args, **kwargs)


def is_paged(value: Any) -> bool:
    """Whether this is Transformers' paged cache."""
    return isinstance(value, tuple(_updates))


def cache_of(key: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """Return the paged cache behind a layer's call with `key` `[B, Hkv, Tk, D]`, or None outside
    continuous batching. `arguments`: the others of the attention function. Up to Transformers 5.23
    the cache is among them; later the layer itself updates it, and `key` knows. Raises ValueError
    for other packed requests."""
    cache = getattr(key, CACHE_OF_KEYS, None) or next(filter(is_paged, arguments.values()), None)
    if cache is None and getattr(_packing, "on", False):
        got = f"Transformers {transformers.__version__} brings no paged cache that is known here"
        allowed = "`generate`, or a version that `hip_hf` was tested with"
        raise ValueError(f"continuous batching: {got}; allowed: {allowed}")
    return cache
