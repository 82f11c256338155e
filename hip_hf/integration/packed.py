"""What a forward of continuous batching brings: which requests, in which pages, and whose kept state still holds.

All of it is on the device. It is read once a forward, for all layers and requests, in three waits.

The cache's layout is not documented; it is found by inspection, and an unknown one raises instead of computing garbage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hip_hf.cache.pages import BlockTable
from hip_hf.state import DecodeState

FORWARD = "_hip_forward"  # attribute of a paged cache: the forward that it serves, or served last


@dataclass(frozen=True)
class Place:
    """Where a layer's tokens are in the cache. `keys` and `values` `[tokens, Hkv, D]` are None for a ring buffer (sliding)."""

    kind: str
    group: int
    page: int = 0
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def row(self, table: BlockTable, position: int) -> int:
        """The row of `keys` that holds a request's token."""
        return table.pages[position // self.page] * self.page + position % self.page


def _layers(cache: Any) -> Iterable[int]:
    return cache.layer_to_allocator if hasattr(cache, "layer_to_allocator") else cache.layer_index_to_group_indices


def find_place(cache: Any, layer: int) -> Place:
    """The layout of a layer.

    Raises:
        ValueError: a cache of an unknown kind.
    """
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        if allocator.layer_type != "full_attention":
            return Place(allocator.layer_type, allocator.index)
        keys, values = allocator._kv_token_views[layer]
        return Place(allocator.layer_type, allocator.index, allocator.tokens_per_page, keys, values)
    if hasattr(cache, "layer_index_to_group_indices"):
        group, index = cache.layer_index_to_group_indices[layer]
        if cache.sliding_windows[layer] != 1:
            return Place("sliding_attention", group)
        return Place("full_attention", group, cache.block_size, cache.key_cache[index], cache.value_cache[index])
    raise ValueError(f"cache: got {type(cache).__name__} of an unknown layout, allowed: Transformers' paged cache as tested")


class Request(NamedTuple):
    """Where a request's new tokens are in a call: rows of its queries, and keys among those of all requests, past and new."""

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


@dataclass(frozen=True)
class Kept:
    """A request's state, its pages, and the key `[Hkv, D]` of its last token."""

    state: DecodeState
    pages: list[int]
    mark: torch.Tensor


def states_of(cache: Any, layer: int) -> dict[int, Kept]:
    """What is kept for a layer, by the page of a request's last token."""
    return cache.__dict__.setdefault("_hip_states", {}).setdefault(layer, {})


@dataclass
class Forward:
    """What the index tensors of a forward say: the same to all of its layers, so it is read once.

    `requests`: those with new tokens, by kind of attention. `tables`: the pages of each, by group. `unchanged`: layers and
    rows of the cache where a kept state's mark was found. `given`: a tensor that the forward's layers share; `layer`: the last.
    """

    requests: dict[str, list[Request]]
    tables: dict[int, list[BlockTable]]
    unchanged: set[tuple[int, int]]
    given: torch.Tensor
    layer: int


def forward_of(cache: Any, layer: int, kwargs: dict[str, Any]) -> Forward:
    """The forward that a layer's call belongs to. The index tensors may be buffers that every forward fills anew, so the same
    tensors do not make the same forward: a layer that is not above the last one begins another."""
    forward: Forward | None = cache.__dict__.get(FORWARD)
    given = kwargs["cu_seq_lens_q"]
    if forward is None or forward.given is not given or layer <= forward.layer:
        places = {i: find_place(cache, i) for i in _layers(cache)}
        requests = _read_requests(places, kwargs)
        tables = _read_tables(places, requests, kwargs)
        forward = Forward(requests, tables, _read_marks(cache, places, requests, tables), given, layer)
        cache.__dict__[FORWARD] = forward
    forward.layer = layer
    return forward


def _fetch(parts: list[torch.Tensor]) -> list[Any]:
    """Tensors of one dimension, one after the other, on the host. The only place that waits for the device."""
    return torch.cat(parts).tolist() if parts else []


def _read_requests(places: dict[int, Place], kwargs: dict[str, Any]) -> dict[str, list[Request]]:
    """The requests that bring tokens, by kind of attention (a padded call has others behind them)."""
    kinds, keys = list(dict.fromkeys(place.kind for place in places.values())), kwargs["cu_seq_lens_k"]
    bounds = [kwargs["cu_seq_lens_q"], *(keys[kind] if isinstance(keys, dict) else keys for kind in kinds)]
    fetched = iter(_fetch(bounds))
    rows, *lengths = [list(itertools.pairwise(itertools.islice(fetched, len(x)))) for x in bounds]
    return {
        kind: [Request(*row, *key) for row, key in zip(rows, each, strict=True) if row[0] < row[1]]
        for kind, each in zip(kinds, lengths, strict=True)
    }


def _read_tables(
    places: dict[int, Place], requests: dict[str, list[Request]], kwargs: dict[str, Any]
) -> dict[int, list[BlockTable]]:
    """The pages of each request, by group; of those that are no ring buffers."""
    groups, firsts = {place.group: place for place in places.values() if place.keys is not None}, []
    for group, place in groups.items():
        read, write = kwargs["read_index"][group], kwargs["write_index"][group]
        for one in requests[place.kind]:
            tokens = read[one.key : one.key_end] if one.before else write[one.row : one.row_end]
            firsts.append(tokens[:: place.page])
    fetched = iter(_fetch(firsts))
    return {
        group: [
            BlockTable([token // place.page for token in itertools.islice(fetched, -(-one.keys // place.page))])
            for one in requests[place.kind]
        ]
        for group, place in groups.items()
    }


def _read_marks(
    cache: Any, places: dict[int, Place], requests: dict[str, list[Request]], tables: dict[int, list[BlockTable]]
) -> set[tuple[int, int]]:
    """Layers and rows of the cache that hold the last token of a request before this call, and still the key that they held
    when its state was kept."""
    asked, equal = [], []
    for layer, place in places.items():
        if place.keys is None:
            continue
        kept, rows, marks = states_of(cache, layer), [], []
        for one, table in zip(requests[place.kind], tables[place.group], strict=True):
            found = kept.get(table.pages[(one.before - 1) // place.page]) if one.before else None
            if found is not None:
                rows.append(place.row(table, one.before - 1))
                marks.append(found.mark)
        if rows:
            asked += [(layer, row) for row in rows]
            equal.append((torch.stack([place.keys[row] for row in rows]) == torch.stack(marks)).flatten(1).all(1))
    return set(itertools.compress(asked, _fetch(equal)))
