"""Pages in host memory or on disk, and the small device pools through which they are read
(InfiniteHiP, section on offloading).

A layer has a pool of `2 * device_pages` pages of keys per head, which the search (scoring blocks
exactly) and attention share, and one of `device_pages` pages of values, which only attention reads.
A pool replaces its least recently used pages. What attention reads, the search has mostly just
looked at: each page of keys is held once for both. A page that is not there is fetched, never
dropped, so results do not depend on the pools. Without a GPU the "device" is host memory as well,
and everything below runs the same.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import astuple, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from hip_hf.cache.pages import BlockTable, HeadRows, Store

OFFLOADS = ("cpu", "disk")
READERS = ("search", "attention")


@dataclass
class Traffic:
    """Pages asked for (per head) and found on the device or not, and bytes moved between host and
    device.

    `streamed` are reads too large for a pool (dense layers, chunked prefill), which bypass it.
    """

    hits: int = 0
    misses: int = 0
    fetched: int = 0
    prefetched: int = 0
    streamed: int = 0
    written: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class DevicePool:
    """Copies of some pages of a store, per head; the least recently used make room for others.
    Counts for each reader."""

    def __init__(self, store: OffloadedStore, pages: int) -> None:
        self.store, self.pages, self.clock = store, pages, 0
        self.traffic = {reader: Traffic() for reader in READERS}
        with torch.inference_mode(False):
            self.rows = torch.empty(
                store.heads, pages * store.page, store.dim, dtype=store.dtype, device=store.device
            )
            self.held = torch.full((store.heads, pages), -1, device="cpu")  # page in each slot
            self.used = torch.zeros_like(self.held)  # when it was last asked for
            self.slot = torch.full((store.heads, 0), -1, device="cpu")  # of each page

    def slots(self, head: int, pages: Tensor, reader: str | None) -> Tensor:
        """Return where in the pool the (distinct) pages `[n]` lie, int64 `[n]`; those that were not
        there are fetched. `reader`: who asks for them; None: they are brought for attention before
        it asks. Raises ValueError for more than the pool holds."""
        known = self.slot.shape[1]
        if len(pages) and int(pages.max()) >= known:
            self.slot = torch.nn.functional.pad(self.slot, (0, int(pages.max()) + 1), value=-1)
        found = self.slot[head, pages]
        missing = pages[found < 0]
        if reader is None:
            self.traffic["attention"].prefetched += len(missing) * self.store.page_bytes
        else:
            traffic = self.traffic[reader]
            traffic.hits += len(pages) - len(missing)
            traffic.misses += len(missing)
            traffic.fetched += len(missing) * self.store.page_bytes
        if len(pages) > self.pages:
            allowed = f"at least {len(pages)}, the pages that one read needs"
            raise ValueError(f"device_pages: got {self.pages}, allowed: {allowed}")
        self.clock += 1
        self.used[head, found[found >= 0]] = self.clock
        if not len(missing):
            return found
        # those just found are the newest
        victims = self.used[head].topk(len(missing), largest=False).indices
        before = self.held[head, victims]
        self.slot[head, before[before >= 0]] = -1
        page = self.store.page
        for number, slot in zip(missing.tolist(), victims.tolist(), strict=True):
            arena, token = self.store.place(number)
            rows = self.store.arenas[arena][head, token : token + page]
            self.rows[head, slot * page : (slot + 1) * page] = rows
        self.held[head, victims], self.slot[head, missing] = missing, victims
        self.used[head, victims] = self.clock
        return self.slot[head, pages]

    def copies(self, page: int) -> list[tuple[int, int]]:
        """Head and slot of each copy of a page."""
        known = self.slot[:, page].tolist() if page < self.slot.shape[1] else []
        return [(head, slot) for head, slot in enumerate(known) if slot >= 0]


class PooledHeadRows(HeadRows):
    """Rows of `size` tokens, read through a pool; an index counts through all pages."""

    def __init__(self, pool: DevicePool, head: int, size: int, reader: str) -> None:
        super().__init__([pool.rows[head].unflatten(0, (-1, size)).flatten(1)], [0])
        self.pool, self.head, self.each, self.reader = pool, head, pool.store.page // size, reader

    def take(self, index: Tensor, out: Tensor) -> None:
        pages, which = (index // self.each).cpu().unique(return_inverse=True)
        # blocks that lie across two pages may need more than the pool has: in two goes
        if len(pages) > self.pool.pages:
            half = len(index) // 2
            self.take(index[:half], out[:half])
            self.take(index[half:], out[half:])
            return
        with self.pool.store.lock:
            slots = self.pool.slots(self.head, pages, self.reader)[which].to(index.device)
            torch.index_select(self.rows[0], 0, slots * self.each + index % self.each, out=out)


class OffloadedStore(Store):
    """A store whose arenas are in host memory (`cpu`) or a mapped file (`disk`), read through a
    pool on `device`.

    `recent`: pages at a sequence's end, beside its first, that are brought to the device as they
    are written. `reader`: whose reads are counted.
    """

    resident, reader = False, "attention"

    def __init__(
        self,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page: int,
        where: str,
        pages: int,
        recent: int,
    ) -> None:
        super().__init__(heads, dim, dtype, device, page)
        self.where, self.recent, self.lock = where, min(recent, pages - 1), threading.RLock()
        self.page_bytes = page * dim * dtype.itemsize  # of one head
        self.pool = DevicePool(self, pages)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle holds: the pages, and how to make a store for them. The pool of a copy
        starts empty."""
        kind = (self.heads, self.dim, self.dtype, self.device, self.page)
        sizes = (*kind, self.where, self.pool.pages, self.recent)
        return refilled, (sizes, self.bounds, self.arenas)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedStore:
        """The pages go straight into the copy's own memory or file, not through a second copy of
        them in memory."""
        make, parts = self.__reduce__()
        memo[id(self)] = other = make(*parts)
        return other

    def for_search(self) -> OffloadedStore:
        """The same pages; what is read counts as the search's."""
        other = object.__new__(OffloadedStore)
        other.__dict__.update(vars(self), reader="search")
        return other

    def make_arena(self, pages: int) -> Tensor:
        shape = (self.heads, pages * self.page, self.dim)
        with torch.inference_mode(False):
            if self.where == "cpu":
                pinned = self.device.type == "cuda"
                return torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=pinned)
            count = prod(shape)
            # lives on, nameless, while it is mapped
            with tempfile.NamedTemporaryFile(prefix="hip_hf.") as file:
                # reserve the space now: a full disk is an error here, and would be a crash at the
                # first write
                os.posix_fallocate(file.fileno(), 0, max(1, count * self.dtype.itemsize))
                mapped = torch.from_file(file.name, shared=True, size=count, dtype=self.dtype)
                return mapped.view(shape)

    def write(self, table: BlockTable, first: int, x: Tensor) -> None:
        super().write(table, first, x)
        self.pool.traffic["attention"].written += x.numel() * x.element_size()
        page, last = self.page, first + x.shape[1]
        end = -(-last // page)
        with self.lock:
            for i in range(first // page, end):
                at = max(first, i * page)
                part = x[:, at - first : (i + 1) * page - first]
                for head, slot in self.pool.copies(table.pages[i]):
                    token = slot * page + at % page
                    self.pool.rows[head, token : token + part.shape[1]] = part[head]
            near = [0, *range(max(1, end - self.recent), end)]
            if first % page == 0 or x.shape[1] > 1:  # else the page is there already
                pages = torch.tensor([table.pages[i] for i in near], device="cpu")
                for head in range(self.heads):
                    self.pool.slots(head, pages, None)

    def copy_page(self, source: int, to: int, tokens: int) -> None:
        super().copy_page(source, to, tokens)
        with self.lock:  # what the pool has of the page is out of date
            for head, slot in self.pool.copies(to):
                self.pool.held[head, slot] = self.pool.slot[head, to] = -1
                self.pool.used[head, slot] = 0

    def read(self, heads: slice, table: BlockTable, first: int, last: int) -> Tensor:
        pages = table.tensor(torch.device("cpu"))[first // self.page : -(-last // self.page)]
        if len(pages) > self.pool.pages:
            whole = super().read(heads, table, first, last)
            self.pool.traffic[self.reader].streamed += whole.numel() * whole.element_size()
            return whole.to(self.device)
        shape = (heads.stop - heads.start, last - first, self.dim)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        token = torch.arange(first, last, device="cpu")
        index, offset = token // self.page - first // self.page, token % self.page
        with self.lock:
            for head, into in zip(range(heads.start, heads.stop), out, strict=True):
                at = self.pool.slots(head, pages, self.reader)[index] * self.page + offset
                torch.index_select(self.pool.rows[head], 0, at.to(self.device), out=into)
        return out

    def head_rows(self, heads: slice, size: int) -> list[PooledHeadRows]:
        some = range(heads.start, heads.stop)
        return [PooledHeadRows(self.pool, head, size, self.reader) for head in some]


def refilled(sizes: tuple[Any, ...], bounds: list[int], arenas: list[Tensor]) -> OffloadedStore:
    """A store of these sizes with copies of these arenas `[Hkv, tokens, D]`."""
    store = OffloadedStore(*sizes)
    store.bounds = list(bounds)
    store.arenas = [store.make_arena(arena.shape[1] // store.page).copy_(arena) for arena in arenas]
    return store


class Statistics(dict[str, Traffic]):
    """Traffic of all layers by reader, `search` and `attention`; `str()` is a table, with both
    together."""

    @property
    def together(self) -> Traffic:
        """The traffic of both readers."""
        return sum(self.values(), Traffic())

    def __str__(self) -> str:
        lines = [f"{'reader':<10}{'hits':>10}{'misses':>10}{'hit rate':>10}{'MiB moved':>12}"]
        for name, traffic in [*self.items(), ("together", self.together)]:
            moved = traffic.fetched + traffic.prefetched + traffic.streamed + traffic.written
            found = f"{traffic.hits:>10}{traffic.misses:>10}{traffic.hit_rate:>10.1%}"
            lines.append(f"{name:<10}{found}{moved / 2**20:>12.1f}")
        return "\n".join(lines)
