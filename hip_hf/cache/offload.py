"""Pages in host memory or on disk, and the small device pools through which they are read (InfiniteHiP, section on offloading).

A layer has a pool of `2 * device_pages` pages of keys per head, which the search (scoring blocks exactly) and attention share,
and one of `device_pages` pages of values, which only attention reads. A pool replaces its least recently used pages. What
attention reads, the search has mostly just looked at: each page of keys is held once for both. A page that is not there is
fetched, never dropped, so results do not depend on the pools. Without a GPU the "device" is host memory as well, and everything
below runs the same.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass, fields
from typing import Any

import torch

from hip_hf.cache.pages import BlockTable, Store

OFFLOADS = ("cpu", "disk")
READERS = ("search", "attention")


@dataclass
class Traffic:
    """Pages asked for (per head) and found on the device or not, and bytes moved between host and device.

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

    def add(self, other: Traffic) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class DevicePool:
    """Copies of some pages of a store, per head; the least recently used make room for others. Counts for each reader."""

    def __init__(self, store: OffloadedStore, pages: int) -> None:
        self.store, self.pages, self.clock = store, pages, 0
        self.traffic = {reader: Traffic() for reader in READERS}
        with torch.inference_mode(False):
            self.rows = torch.empty(store.heads, pages * store.page, store.dim, dtype=store.dtype, device=store.device)
            self.held = torch.full((store.heads, pages), -1, device="cpu")  # page in each slot
            self.used = torch.zeros(store.heads, pages, dtype=torch.long, device="cpu")  # when it was last asked for
            self.slot = torch.full((store.heads, 0), -1, device="cpu")  # of each page

    def slots(self, head: int, pages: torch.Tensor, reader: str) -> torch.Tensor:
        """Where the (distinct) pages lie in the pool, fetched if they did not.

        Raises:
            ValueError: more pages than the pool holds.
        """
        found = self._find(head, pages)
        missing = pages[found < 0]
        traffic = self.traffic[reader]
        traffic.hits += len(pages) - len(missing)
        traffic.misses += len(missing)
        traffic.fetched += len(missing) * self.store.page_bytes
        return self._bring(head, pages, found, missing)

    def prefetch(self, pages: torch.Tensor) -> None:
        """Bring pages for every head before attention asks for them."""
        for head in range(self.store.heads):
            found = self._find(head, pages)
            missing = pages[found < 0]
            self.traffic["attention"].prefetched += len(missing) * self.store.page_bytes
            self._bring(head, pages, found, missing)

    def _find(self, head: int, pages: torch.Tensor) -> torch.Tensor:
        known = self.slot.shape[1]
        if len(pages) and int(pages.max()) >= known:
            more = torch.full((self.store.heads, int(pages.max()) + 1 + known), -1, device="cpu")
            more[:, :known] = self.slot
            self.slot = more
        return self.slot[head, pages]

    def _bring(self, head: int, pages: torch.Tensor, found: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        if len(pages) > self.pages:
            raise ValueError(f"device_pages: got {self.pages}, allowed: at least {len(pages)}, the pages that one read needs")
        self.clock += 1
        self.used[head, found[found >= 0]] = self.clock
        if not len(missing):
            return found
        victims = self.used[head].topk(len(missing), largest=False).indices  # those just found are the newest
        before = self.held[head, victims]
        self.slot[head, before[before >= 0]] = -1
        page = self.store.page
        for number, slot in zip(missing.tolist(), victims.tolist(), strict=True):
            slab, token = self.store.place(number)
            self.rows[head, slot * page : (slot + 1) * page] = self.store.slabs[slab][head, token : token + page]
        self.held[head, victims], self.slot[head, missing], self.used[head, victims] = missing, victims, self.clock
        return self.slot[head, pages]

    def forget(self, page: int) -> None:
        """The page was written in host memory: what the pool has of it is out of date."""
        if page < self.slot.shape[1]:
            for head, slot in enumerate(self.slot[:, page].tolist()):
                if slot >= 0:
                    self.held[head, slot], self.used[head, slot] = -1, 0
            self.slot[:, page] = -1

    def write(self, page: int, offset: int, x: torch.Tensor) -> None:
        """Tokens `[Hkv, n, D]` that were written into a page in host memory: into the pool's copies as well."""
        if page >= self.slot.shape[1]:
            return
        for head, slot in enumerate(self.slot[:, page].tolist()):
            if slot >= 0:
                at = slot * self.store.page + offset
                self.rows[head, at : at + x.shape[1]] = x[head]


class PoolLane:
    """One head's keys, read through a pool; indices count units through all pages of the store."""

    def __init__(self, pool: DevicePool, head: int, size: int, reader: str) -> None:
        self.pool, self.head, self.each, self.reader = pool, head, pool.store.page // size, reader
        self.rows = pool.rows[head].unflatten(0, (-1, size)).flatten(1)
        self.width = self.rows.shape[1]

    def take(self, index: torch.Tensor, out: torch.Tensor) -> None:
        """The rows at `index` into `out`."""
        pages, which = (index // self.each).cpu().unique(return_inverse=True)
        if len(pages) > self.pool.pages:  # blocks that lie across two pages may need more than the pool has: in two goes
            half = len(index) // 2
            self.take(index[:half], out[:half])
            self.take(index[half:], out[half:])
            return
        with self.pool.store.lock:
            slots = self.pool.slots(self.head, pages, self.reader)[which].to(index.device)
            torch.index_select(self.rows, 0, slots * self.each + index % self.each, out=out)


class OffloadedStore(Store):
    """A store whose slabs are in host memory (`cpu`) or a mapped file (`disk`), read through a pool on `device`.

    `recent`: pages at a sequence's end, beside its first, that are brought to the device as they are written.
    """

    resident = False

    def __init__(
        self, heads: int, dim: int, dtype: torch.dtype, device: torch.device, page: int, where: str, pages: int, recent: int
    ) -> None:
        super().__init__(heads, dim, dtype, device, page)
        self.where, self.recent, self.lock = where, min(recent, pages - 1), threading.RLock()
        self.page_bytes = page * dim * dtype.itemsize  # of one head
        self.pool = DevicePool(self, pages)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle holds: the pages, and how to make a store for them. The pool of a copy starts empty."""
        sizes = (self.heads, self.dim, self.dtype, self.device, self.page, self.where, self.pool.pages, self.recent)
        return refilled, (sizes, self.bounds, self.slabs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedStore:
        """The pages go straight into the copy's own memory or file, not through a second copy of them in memory."""
        make, parts = self.__reduce__()
        memo[id(self)] = other = make(*parts)
        return other

    def for_search(self) -> SearchedStore:
        """The same pages; what is read counts as the search's."""
        return SearchedStore(self)

    def make_slab(self, pages: int) -> torch.Tensor:
        shape = (self.heads, pages * self.page, self.dim)
        with torch.inference_mode(False):
            if self.where == "cpu":
                return torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=self.device.type == "cuda")
            count = self.heads * pages * self.page * self.dim
            with tempfile.NamedTemporaryFile(prefix="hip_hf.") as file:  # lives on, nameless, while it is mapped
                # reserve the space now: a full disk is an error here, and would be a crash at the first write
                os.posix_fallocate(file.fileno(), 0, max(1, count * self.dtype.itemsize))
                return torch.from_file(file.name, shared=True, size=count, dtype=self.dtype).view(shape)

    def write(self, table: BlockTable, first: int, x: torch.Tensor) -> None:
        super().write(table, first, x)
        self.pool.traffic["attention"].written += x.numel() * x.element_size()
        page, last, at = self.page, first + x.shape[1], first
        with self.lock:
            while at < last:
                end = min(last, (at // page + 1) * page)
                number = table.pages[at // page]
                self.pool.write(number, at % page, x[:, at - first : end - first])
                at = end
            near = [0, *range(max(1, -(-last // page) - self.recent), -(-last // page))]
            if first % page == 0 or x.shape[1] > 1:  # else the page is there already
                self.pool.prefetch(torch.tensor([table.pages[i] for i in near], device="cpu"))

    def copy_page(self, source: int, to: int, tokens: int) -> None:
        super().copy_page(source, to, tokens)
        with self.lock:
            self.pool.forget(to)

    def read(self, heads: slice, table: BlockTable, first: int, last: int, reader: str = "attention") -> torch.Tensor:
        pages = table.tensor(torch.device("cpu"))[first // self.page : -(-last // self.page)]
        if len(pages) > self.pool.pages:
            whole = super().read(heads, table, first, last)
            self.pool.traffic[reader].streamed += whole.numel() * whole.element_size()
            return whole.to(self.device)
        out = torch.empty(heads.stop - heads.start, last - first, self.dim, dtype=self.dtype, device=self.device)
        token = torch.arange(first, last, device="cpu")
        index, offset = token // self.page - first // self.page, token % self.page
        with self.lock:
            for lane, head in enumerate(range(heads.start, heads.stop)):
                at = self.pool.slots(head, pages, reader)[index] * self.page + offset
                torch.index_select(self.pool.rows[head], 0, at.to(self.device), out=out[lane])
        return out

    def lanes(self, heads: slice, size: int) -> list[Any]:
        return [PoolLane(self.pool, head, size, "attention") for head in range(heads.start, heads.stop)]


def refilled(sizes: tuple[Any, ...], bounds: list[int], slabs: list[torch.Tensor]) -> OffloadedStore:
    """A store of these sizes with copies of these slabs `[Hkv, tokens, D]`."""
    store = OffloadedStore(*sizes)
    store.bounds = list(bounds)
    store.slabs = [store.make_slab(slab.shape[1] // store.page).copy_(slab) for slab in slabs]
    return store


class SearchedStore(Store):
    """What the search sees of an offloaded store."""

    resident = False

    def __init__(self, store: OffloadedStore) -> None:
        super().__init__(store.heads, store.dim, store.dtype, store.device, store.page)
        self.store, self.slabs, self.bounds = store, store.slabs, store.bounds

    def read(self, heads: slice, table: BlockTable, first: int, last: int) -> torch.Tensor:
        return self.store.read(heads, table, first, last, "search")

    def lanes(self, heads: slice, size: int) -> list[Any]:
        return [PoolLane(self.store.pool, head, size, "search") for head in range(heads.start, heads.stop)]


class Statistics(dict[str, Traffic]):
    """Traffic of all layers by reader, `search` and `attention`; `str()` is a table, with both together."""

    @property
    def together(self) -> Traffic:
        """The traffic of both readers."""
        total = Traffic()
        for traffic in self.values():
            total.add(traffic)
        return total

    def __str__(self) -> str:
        lines = [f"{'reader':<10}{'hits':>10}{'misses':>10}{'hit rate':>10}{'MiB moved':>12}"]
        for name, traffic in [*self.items(), ("together", self.together)]:
            moved = (traffic.fetched + traffic.prefetched + traffic.streamed + traffic.written) / 2**20
            lines.append(f"{name:<10}{traffic.hits:>10}{traffic.misses:>10}{traffic.hit_rate:>10.1%}{moved:>12.1f}")
        return "\n".join(lines)


def statistics(stores: list[OffloadedStore]) -> Statistics:
    """Summed over stores."""
    found = Statistics({reader: Traffic() for reader in READERS})
    for store in stores:
        for reader, traffic in store.pool.traffic.items():
            found[reader].add(traffic)
    return found
