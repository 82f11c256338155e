"""How many keys a call reads, for `explain` and for measuring: in closed form, for a prompt of a million tokens has thousands of
query blocks, and every layer asks."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from hip_hf.geometry import block_read, keys_seen, make_query_block

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig


@dataclass
class Reading:
    """How many keys were read, and how many there were to read: both summed over query rows, per head."""

    read: int = 0
    visible: int = 0


@dataclass(frozen=True)
class Blocks:
    """The query blocks of `size` rows of a call whose rows sit at positions `first` to `end - 1`. They pick up to `budget` key
    blocks."""

    config: HiPConfig
    budget: int
    first: int
    end: int
    size: int
    sliding: int | None

    def read(self, dense: int) -> int:
        """Keys that the rows read, summed over them; from position `dense` on they are dense."""
        if dense <= self.first:
            return keys_seen(self.first, self.end - 1, self.sliding) if self.first < self.end else 0
        size = self.size
        cut = {x // size * size for x in (self.first, dense) if x % size}
        whole = -(-self.first // size) * size, dense // size * size
        read = sum(self._cut(low, dense) for low in cut) + self._whole(*whole)
        return read + (keys_seen(dense, self.end - 1, self.sliding) if dense < self.end else 0)

    def _block(self, first: int, last: int) -> int:
        block = make_query_block(self.config, first - self.first, first, last, None, self.sliding)
        return block_read(block, min(block.middle, self.budget) * self.config.block_k, self.sliding)

    def _cut(self, low: int, dense: int) -> int:
        """Of a block that does not begin with its first row or end with its last, or whose last rows are dense: the other rows'
        share of what it reads."""
        first, end = max(low, self.first), min(low + self.size, self.end)
        return self._block(first, end - 1) * (min(dense, end) - first) // (end - first)

    def _whole(self, first: int, end: int) -> int:
        """Blocks from `first` to `end`, multiples of the size. Between the places where another rule begins to hold, what every
        `period`-th block reads is an arithmetic progression: they lie alike on the key blocks."""
        config, size = self.config, self.size
        sink = -(-config.sink // config.block_k) * config.block_k
        covered = config.window + sink + (self.budget + 1) * config.block_k  # from here on the budget leaves keys out
        period = config.block_k // gcd(size, config.block_k)
        if self.sliding is None:
            return self._progressions(first, min(end, covered), period) + self._progressions(max(first, covered), end, period)
        full = self.sliding - size + 1  # the first position of a block with a row whose sliding window is full
        steady = max(full, self.sliding - 1 + sink)  # from here on the sink is out of every row's sight
        covered = min(covered, full)
        read = self._progressions(first, min(end, covered), period)
        read += self._progressions(max(first, covered), min(end, full), period)
        between = range(-(-max(first, full) // size) * size, min(end, steady), size)
        read += sum(self._block(x, x + size - 1) for x in between)
        return read + self._progressions(max(first, steady), end, period)

    def _progressions(self, since: int, until: int, period: int) -> int:
        """Blocks whose first rows are at `since` to `until - 1`."""
        size = self.size
        low, high = -(-since // size), -(-until // size)
        total = 0
        for i in range(low, min(low + period, high)):
            count = -(-(high - i) // period)
            ends = (self._block(x * size, (x + 1) * size - 1) for x in (i, i + (count - 1) * period))
            total += count * sum(ends) // 2
        return total
