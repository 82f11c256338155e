"""The pages of one layer: which are free, which sequences refer to them, and writing without
disturbing a sharer."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import islice

from torch import Tensor

from hip_hf.cache.pages import BlockTable, Store

# Tokens per page: small, so that what is selected fills few device pages beyond itself when the
# cache is offloaded.
PAGE = 64
# Most pages that are added at once beyond what is asked for: what waits to be used does not grow
# with the context.
MOST_SPARE = 256


class PagePool:
    """Pages of a layer's keys and values, under the same numbers in both stores.

    A page that several sequences refer to is never written: a sequence that appends to it gets a
    copy first. `one_piece`: all pages lie in one arena, which is copied when more are needed, for
    the kernels read them by one address.
    """

    def __init__(self, keys: Store, values: Store, one_piece: bool = False) -> None:
        self.keys, self.values, self.one_piece = keys, values, one_piece
        self.ref_count: list[int] = []  # sequences that refer to each page
        # a heap: the lowest page first, so that sequences stay in one piece
        self.free: list[int] = []

    @property
    def used(self) -> int:
        """Pages that some sequence refers to."""
        return len(self.ref_count) - len(self.free)

    def bytes(self, pages: int) -> int:
        """Return the size of `pages` pages, keys and values, in bytes."""
        sizes = [x.heads * x.dim * x.dtype.itemsize for x in (self.keys, self.values)]
        return pages * self.keys.page * sum(sizes)

    def allocate(self, count: int) -> list[int]:
        """So many free pages. Raises MemoryError if there is no memory for them; nothing has
        changed."""
        missing = count - len(self.free)
        if missing > 0:
            # by half of what there is, so that a growing sequence has few arenas. A single arena
            # grows so the first time, too: filled by the prompt, it would be copied at the first
            # decode step.
            if self.one_piece:
                missing += min((len(self.ref_count) + missing) // 2, MOST_SPARE)
            self._grow(max(missing, min(len(self.ref_count) // 2, MOST_SPARE)))
        pages = [heapq.heappop(self.free) for _ in range(count)]
        for page in pages:
            self.ref_count[page] = 1
        return pages

    def _grow(self, count: int) -> None:
        first = len(self.ref_count)
        stores, pages = (self.keys, self.values), count + (first if self.one_piece else 0)
        try:
            arenas = [store.make_arena(pages) for store in stores]
        except (RuntimeError, OSError, MemoryError) as error:
            size = self.bytes(pages)
            wanted = f"{count} more pages ({size / 2**20:.0f} MiB)"
            raise MemoryError(f"HiPCache: no room for {wanted}: {error}") from error
        for store, arena in zip(stores, arenas, strict=True):
            if self.one_piece:
                for old in store.arenas:
                    arena[:, : old.shape[1]] = old
                store.arenas.clear()
                store.bounds.clear()
            store.arenas.append(arena)
            store.bounds.append(0 if self.one_piece else first)
        self.ref_count += [0] * count
        for page in range(first, first + count):
            heapq.heappush(self.free, page)

    def share(self, table: BlockTable) -> BlockTable:
        """Another sequence with the same pages, by reference."""
        for page in table.pages:
            self.ref_count[page] += 1
        return BlockTable(list(table.pages))

    def release(self, pages: list[int]) -> None:
        """A sequence no longer refers to these pages."""
        for page in pages:
            self.ref_count[page] -= 1
            if not self.ref_count[page]:
                heapq.heappush(self.free, page)

    def truncate(self, table: BlockTable, length: int) -> None:
        """The sequence now has `length` tokens."""
        kept = -(-length // self.keys.page)
        if kept < len(table):
            self.release(table.pages[kept:])
            table.set(table.pages[:kept])

    def append(self, tables: list[BlockTable], length: int, keys: Tensor, values: Tensor) -> None:
        """Append `[B, Hkv, n, D]` to sequences of `length` tokens each, in place. Raises
        MemoryError if there is no memory for more pages; nothing has changed."""
        more = keys.shape[2]
        # a step's token mostly finds room in a page of its sequence alone
        full = more > 1 or length % self.keys.page == 0
        if full or any(self.ref_count[table.pages[-1]] > 1 for table in tables):
            self._make_room(tables, length, more)
        if self.one_piece and more == 1:
            self.keys.write_step(tables, length, keys)
            self.values.write_step(tables, length, values)
            return
        for row, table in enumerate(tables):
            self.keys.write(table, length, keys[row])
            self.values.write(table, length, values[row])

    def _make_room(self, tables: list[BlockTable], length: int, more: int) -> None:
        """Give sequences of `length` tokens pages of their own for `more` tokens each. Raises
        MemoryError as `append` does."""
        offset, total = length % self.keys.page, -(-(length + more) // self.keys.page)
        copied, seen = [], Counter[int]()  # how many of them have had the page that is continued
        for table in tables:
            last = table.pages[-1] if offset else -1
            copied.append(offset > 0 and self.ref_count[last] - seen[last] > 1)
            seen[last] += 1
        fresh = iter(self.allocate(sum(copied) + sum(total - len(table) for table in tables)))
        for table, copy in zip(tables, copied, strict=True):
            if copy:
                own, shared = next(fresh), table.pages[-1]
                for store in (self.keys, self.values):
                    store.copy_page(shared, own, offset)
                self.release([shared])
                table.set([*table.pages[:-1], own])
            table.extend(list(islice(fresh, total - len(table))))
