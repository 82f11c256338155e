"""Keys and values in pages: where they lie, and how attention reads them without gathering them
all.

A sequence's keys fill pages of `page` tokens, in the order of its block table. Pages live in
*arenas*, `[Hkv, tokens, D]`, which are added as more are needed and not copied (for the kernels the
only one is replaced by a larger copy); page `p` is the tokens `p * page` to `(p + 1) * page - 1` of
all arenas put end to end. Attention asks for contiguous ranges (sink, window, dense tiles) and for
key blocks by index.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, inf
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the host, of any shape, to `device` without a wait."""
    return (host if device.type == "cpu" else host.pin_memory()).to(device, non_blocking=True)


_versions = itertools.count()  # of block tables: each change makes a new one


class BlockTable:
    """The pages of one sequence, in order, and what is derived from them: as pages are added, from
    the new ones alone."""

    def __init__(self, pages: list[int] | None = None) -> None:
        self.set(pages or [])

    def __len__(self) -> int:
        return len(self.pages)

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """A copy, maybe of another process, whose versions say nothing here."""
        self.__dict__.update(kept, version=next(_versions), _stacked=None)

    def set(self, pages: list[int]) -> None:
        """Replace the pages."""
        self.pages = pages
        self.version = next(_versions)
        self._tensor: Tensor | None = None
        # of a batch whose first table this is, by versions
        self._stacked: tuple[list[int], Tensor] | None = None
        self._runs: list[tuple[int, int, int]] = []

    def extend(self, pages: list[int]) -> None:
        """Add pages at the end."""
        self.pages += pages
        self.version = next(_versions)

    def tensor(self, device: torch.device) -> Tensor:
        """The pages, int64 `[len]`."""
        known = 0 if self._tensor is None or self._tensor.device != device else len(self._tensor)
        if known < len(self.pages) or self._tensor is None:
            with torch.inference_mode(False):
                pages, old = self.pages[known:], self._tensor
                new = to_device(torch.tensor(pages, dtype=torch.long, device="cpu"), device)
                self._tensor = new if known == 0 or old is None else torch.cat([old, new])
        return self._tensor

    @staticmethod
    def stacked(tables: list[BlockTable], device: torch.device) -> Tensor:
        """The pages of every sequence of a batch, int64 `[B, most pages]`; what follows a
        sequence's last one is 0."""
        versions = [table.version for table in tables]
        known = tables[0]._stacked
        if known is None or known[0] != versions or known[1].device != device:
            with torch.inference_mode(False):
                each = [table.tensor(device) for table in tables]
                alone = len(each) == 1
                whole = each[0][None] if alone else pad_sequence(each, batch_first=True)
            known = tables[0]._stacked = versions, whole
        return known[1]

    def runs(self, bounds: list[int]) -> list[tuple[int, int, int]]:
        """Runs of neighbouring pages of one arena: (index in the table, first page, count).
        `bounds`: first page of each arena."""
        runs = self._runs
        known = sum(runs[-1][::2]) if runs else 0
        if known == len(self.pages):
            return runs
        runs = list(runs)  # several workers may ask at once
        for i in range(known, len(self.pages)):
            page = self.pages[i]
            if runs and page == runs[-1][1] + runs[-1][2] and page not in bounds:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((i, page, 1))
        self._runs = runs
        return runs


class HeadRows:
    """One head's keys (or values) in each arena, `[rows, width]`, to pick by an index that counts
    through all arenas. `first`: that of each arena's first row."""

    def __init__(self, rows: list[Tensor], first: list[int]) -> None:
        self.rows, self.first, self.width = rows, first, rows[0].shape[1]
        self.bounds = torch.tensor(first[1:], device=rows[0].device) if first[1:] else None

    def take(self, index: Tensor, out: Tensor) -> None:
        """Copy the rows at `index` int64 `[n]` into `out` `[n, width]`, run by run of indices into
        the same arena."""
        if self.bounds is None:
            torch.index_select(self.rows[0], 0, index, out=out)
            return
        which = torch.bucketize(index, self.bounds, right=True)
        which, counts = which.unique_consecutive(return_counts=True)
        at = 0
        for arena, count in zip(which.tolist(), counts.tolist(), strict=True):
            part = index[at : at + count] - self.first[arena]
            torch.index_select(self.rows[arena], 0, part, out=out[at : at + count])
            at += count


# Steps of a model's layers, which mostly have their pages alike, and of a few models in turn.
_KEPT_ROWS = 16


@lru_cache(maxsize=_KEPT_ROWS)
def row_numbers(rows: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return to_device(torch.tensor(rows, device="cpu"), device)


class Store:
    """The arenas of one layer's keys (or values)."""

    resident = True  # whether arenas are where attention computes

    def __init__(
        self, heads: int, dim: int, dtype: torch.dtype, device: torch.device, page: int
    ) -> None:
        self.heads, self.dim, self.dtype, self.device, self.page = heads, dim, dtype, device, page
        self.arenas: list[Tensor] = []
        self.bounds: list[int] = []  # first page of each arena
        # the only arena, and views of it: pages `[pages, page, Hkv, D]`, and tokens
        # `[Hkv, tokens, 1, D]`
        self._views: tuple[Tensor, Tensor, Tensor] | None = None

    def make_arena(self, pages: int) -> Tensor:
        """Return uninitialised memory for `pages` pages: `[Hkv, pages * page, D]`."""
        with torch.inference_mode(False):  # it outlives the mode it was made in
            return torch.empty(
                self.heads, pages * self.page, self.dim, dtype=self.dtype, device=self.device
            )

    def place(self, page: int) -> tuple[int, int]:
        """Arena of a page, and the page's first token in it."""
        arena = bisect_right(self.bounds, page) - 1
        return arena, (page - self.bounds[arena]) * self.page

    def pieces(self, table: BlockTable, first: int, last: int) -> list[tuple[int, int, int]]:
        """Where tokens `first` to `last - 1` of a sequence lie: (arena, token in it, count) of each
        run."""
        runs: list[Any] = table.runs(self.bounds)
        pieces = []
        at = bisect_right(runs, (first // self.page, inf)) - 1
        while first < last:
            index, page, count = runs[at]
            end = min(last, (index + count) * self.page)
            arena, token = self.place(page)
            pieces.append((arena, token + first - index * self.page, end - first))
            first, at = end, at + 1
        return pieces

    def read(self, heads: slice, table: BlockTable, first: int, last: int) -> Tensor:
        """Tokens `first` to `last - 1` of a sequence, `[heads, tokens, D]`: a view where they lie
        in one piece, else a copy."""
        pieces = self.pieces(table, first, last)
        parts = [self.arenas[arena][heads, token : token + count] for arena, token, count in pieces]
        if not parts:
            return self.arenas[0][heads, :0]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def write(self, table: BlockTable, first: int, x: Tensor) -> None:
        """Tokens `[Hkv, n, D]` into a sequence, from its token `first` on."""
        if x.shape[1] == 1:  # a step's token
            arena, token = self.place(table.pages[first // self.page])
            self.arenas[arena][:, token + first % self.page] = x[:, 0]
            return
        at = 0
        for arena, token, count in self.pieces(table, first, first + x.shape[1]):
            self.arenas[arena][:, token : token + count] = x[:, at : at + count]
            at += count

    def copy_page(self, source: int, to: int, tokens: int) -> None:
        """The first `tokens` tokens of one page into another."""
        (a, i), (b, j) = self.place(source), self.place(to)
        self.arenas[b][:, j : j + tokens] = self.arenas[a][:, i : i + tokens]

    def for_search(self) -> Store:
        """What a search reads these keys from."""
        return self

    def pages(self) -> Tensor | None:
        """All pages as one view `[pages, page, Hkv, D]`, by their numbers; None if they are not one
        piece of device memory."""
        if not self.resident or len(self.arenas) != 1:
            return None
        return self._one_arena()[1]

    def _one_arena(self) -> tuple[Tensor, Tensor, Tensor]:
        """The only arena and its views, made once: a view takes the host longer than a step's whole
        bookkeeping."""
        (arena,) = self.arenas
        if self._views is None or self._views[0] is not arena:
            pages = arena.unflatten(1, (-1, self.page)).permute(1, 2, 0, 3)
            self._views = arena, pages, arena.unsqueeze(2)
        return self._views

    def __getstate__(self) -> dict[str, Any]:
        """Without views: those that come back from a pickle would be copies of what they are views
        of."""
        return {**vars(self), "_views": None}

    def write_step(self, tables: list[BlockTable], position: int, x: Tensor) -> None:
        """The next token of each sequence, `[B, Hkv, 1, D]`, at its `position`, into pages that are
        one arena: one operation."""
        offset = position % self.page
        rows = tuple(table.pages[position // self.page] * self.page + offset for table in tables)
        self._one_arena()[2].index_copy_(1, row_numbers(rows, self.device), x.transpose(0, 1))

    def gather_size(self, start: int, block: int) -> int:
        """Tokens that are picked together, of key blocks of `block` tokens which begin at token
        `start`."""
        return gcd(start, block, self.page)

    def index(self, heads: slice, table: BlockTable, row: Tensor, size: int) -> Tensor:
        """Where a sequence's rows of `size` tokens `row` `[heads, ...]` are in `head_rows`."""
        each = self.page // size
        return table.tensor(row.device)[row // each] * each + row % each

    def head_rows(self, heads: slice, size: int) -> Sequence[HeadRows]:
        """Every head's rows of `size` tokens."""
        views = [arena[heads].unflatten(1, (-1, size)).flatten(2) for arena in self.arenas]
        first = [bound * self.page // size for bound in self.bounds]
        return [HeadRows(list(rows), first) for rows in zip(*views, strict=True)]


@dataclass(frozen=True, eq=False)
class PagedKeys:
    """Keys (or values) of one sequence from token `start` on, `[heads, length, D]`.

    `x[heads]` narrows the heads, `x[heads, a:b]` reads a range as a tensor.
    """

    store: Store
    table: BlockTable
    start: int
    length: int
    heads: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape `(heads, length, D)` that a tensor of these keys would have."""
        return self.heads.stop - self.heads.start, self.length, self.store.dim

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the keys."""
        return self.store.dtype

    @property
    def device(self) -> torch.device:
        """Return the device on which attention computes."""
        return self.store.device

    @overload
    def __getitem__(self, at: slice) -> PagedKeys: ...
    @overload
    def __getitem__(self, at: tuple[slice, slice]) -> Tensor: ...
    def __getitem__(self, at: slice | tuple[slice, slice]) -> KeyRows:
        if isinstance(at, tuple):
            first, last, _ = at[1].indices(self.length)
            first, last = self.start + first, self.start + max(first, last)
            return self.store.read(self._narrow(at[0]), self.table, first, last)
        return replace(self, heads=self._narrow(at))

    def _narrow(self, heads: slice) -> slice:
        first, last, _ = heads.indices(self.heads.stop - self.heads.start)
        return slice(self.heads.start + first, self.heads.start + last)

    def for_search(self) -> PagedKeys:
        """The same keys as a search reads them."""
        return replace(self, store=self.store.for_search())

    def borders(self, first: int, last: int) -> list[int]:
        """The tokens between `first` and `last - 1` at which another piece of memory begins. Where
        there are none, reading the range copies nothing."""
        pieces = self.store.pieces(self.table, self.start + first, self.start + last)
        counts = [count for _, _, count in pieces[:-1]]
        return [first + length for length in itertools.accumulate(counts)]


KeyRows = Tensor | PagedKeys  # `[Hkv, T, D]`


def head_rows_of(keys: KeyRows, block_k: int) -> Sequence[HeadRows]:
    """Every head's rows of keys `[Hkv, T, D]` to pick key blocks from, by `block_index`."""
    if isinstance(keys, PagedKeys):
        return keys.store.head_rows(keys.heads, keys.store.gather_size(keys.start, block_k))
    whole = keys.shape[1] // block_k * block_k
    blocks = keys[:, :whole].unflatten(1, (-1, block_k)).flatten(2)
    return [HeadRows([rows], [0]) for rows in blocks]


def block_index(keys: KeyRows, ids: Tensor, block_k: int) -> Tensor:
    """Those of `head_rows_of` that make up the key blocks `ids` `[heads, ..., n]`:
    `[heads, ..., n * rows per block]`."""
    if not isinstance(keys, PagedKeys):
        return ids
    size = keys.store.gather_size(keys.start, block_k)
    each = block_k // size
    row = ids
    if each > 1:
        row = (ids[..., None] * each + torch.arange(each, device=ids.device)).flatten(-2)
    return keys.store.index(keys.heads, keys.table, row + keys.start // size, size)


def pick(keys: KeyRows, ids: Tensor, block_k: int, out: Tensor | None = None) -> Tensor:
    """The rows of the key blocks `ids` `[Hkv, n]`: `[Hkv, n * block_k, D]`, into `out` if there is
    one."""
    heads, _, dim = keys.shape
    if out is None:
        out = torch.empty(heads, ids.shape[1] * block_k, dim, dtype=keys.dtype, device=keys.device)
    if ids.shape[1]:
        every, index = head_rows_of(keys, block_k), block_index(keys, ids, block_k)
        for rows, own, into in zip(every, index, out, strict=True):
            rows.take(own, into.view(-1, rows.width))
    return out


class PagedTensor(Tensor):
    """What a paged cache hands to the attention function in place of keys (or values)
    `[B, Hkv, T, D]`.

    The attention function of `hip` reads it sequence by sequence (`rows_of`). For whatever else is
    done with it, it is the ordinary tensor (`dense`), gathered at that moment.
    """

    @staticmethod
    def __new__(cls, store: Store, tables: list[BlockTable], length: int) -> PagedTensor:
        shape = (len(tables), store.heads, length, store.dim)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=store.dtype, device=store.device)

    def __init__(self, store: Store, tables: list[BlockTable], length: int) -> None:
        self.store, self.tables = store, tables

    def block_table(self) -> Tensor:
        """The pages of every sequence, int64 `[B, most pages]`; what follows a sequence's last one
        is 0."""
        return BlockTable.stacked(self.tables, self.device)

    def dense(self) -> Tensor:
        """Return the ordinary tensor `[B, Hkv, T, D]`: a view where there is one sequence in one
        piece."""
        return read_all(self.store, self.tables, self.shape[2])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PagedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(PagedTensor, lambda x: x.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


def read_all(store: Store, tables: list[BlockTable], length: int) -> Tensor:
    """Sequences of `length` tokens each as an ordinary tensor `[B, Hkv, T, D]`."""
    rows = [store.read(slice(0, store.heads), table, 0, length) for table in tables]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def rows_of(x: Tensor, batch: int, first: int, last: int) -> KeyRows:
    """Return keys (or values) `first` to `last - 1` of a batch row of `x` `[B, Hkv, T, D]`,
    wherever they lie: `[Hkv, last - first, D]`."""
    if not isinstance(x, PagedTensor):
        return x[batch, :, first:last]
    return PagedKeys(x.store, x.tables[batch], first, last - first, slice(0, x.store.heads))
