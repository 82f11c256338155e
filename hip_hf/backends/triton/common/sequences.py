"""What the kernels are told about a call: which sequences there are, where their rows and keys lie,
contiguous or in pages, and the query blocks.

All of it is read on the device, so no launch waits for the host; the grid is fixed from `max_rows`
and programs without work return at once. Everything inside a sequence is relative to its first real
key (`Span` in `geometry.py`): padding enters no block. Offsets of keys are int64: a cache may hold
more than 2**31 elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hip_hf.cache.pages import to_device
from hip_hf.geometry import Span

# What changes with the length of a prompt or as a context grows: Triton would compile anew where it
# becomes divisible by 16. None of it is the stride of anything that is read in vectors.
GROWING = (
    *("stride_table", "blocks", "count", "stride_ls", "stride_lb", "stride_lh", "stride_ms"),
    *("stride_mb", "stride_mh", "stride_rows", "stride_keys", "stride_starts"),
)
# Numbers of a sequence in the table.
FIELDS = 5


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of a call.

    Contiguous: k `[B, Hkv, T, D]`, v `[B, Hkv, T, Dv]`. Paged: k `[pages, page_size, Hkv, D]`, v
    likewise, and `block_table` int `[B, most pages]` on the same device: slot `t` of batch row `b`
    is token `t % page_size` of page `block_table[b, t // page_size]`. The last dimension has stride
    1 in both.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor | None = None

    @property
    def page_size(self) -> int:
        """Keys per page; 0 where keys are contiguous."""
        return 0 if self.block_table is None else self.k.shape[1]

    @property
    def heads(self) -> int:
        """Return the number of key heads."""
        return self.k.shape[1] if self.block_table is None else self.k.shape[2]

    def strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        """Return the strides of k or v (`x`, of the shapes above) in elements: from one batch row
        (or page) to the next, from head to head, from token to token."""
        batch, b, c, _ = x.stride()
        return (batch, b, c) if self.block_table is None else (batch, c, b)

    def table(self) -> tuple[torch.Tensor, int]:
        """Return the block table `[B, most pages]` and the stride of its rows; where there is none,
        a stand-in that no kernel reads."""
        table = self.block_table
        return (self.k, 0) if table is None else (table, table.stride(0))


@dataclass(frozen=True)
class Sequences:
    """The real sequences of a call.

    `table` int32 `[5, S]`, on the device: of each sequence its `batch` row (or row of the block
    table), the slot `key_start` of its first key, the row `row_start` of its first query, its
    number of query `rows` (0: nothing to do), and the `position` of the first of them, counted from
    the first key. `max_rows` and `max_keys` are bounds known to the host: they fix grids and
    scratch.
    """

    table: torch.Tensor
    max_rows: int
    max_keys: int

    @property
    def count(self) -> int:
        """Return the number of sequences."""
        return self.table.shape[1]

    def blocks(self, block_q: int) -> int:
        """Query blocks of a sequence at most; aligned to positions, so the first may be cut.
        `block_q` 1: every row."""
        return self.max_rows if block_q == 1 else -(-(self.max_rows - 1) // block_q) + 1

    @staticmethod
    def of(spans: Iterable[Span], device: torch.device) -> Sequences:
        """From spans that the host knows: one small copy to the device, no wait.

        `max_keys` is the end of the longest span's rows, `max_rows` the most rows of a span.
        """
        spans = list(spans)
        rows = [[s.batch, s.key_start, s.row_start, s.rows, s.position] for s in spans]
        table = torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, FIELDS).t()
        most_rows = max((s.rows for s in spans), default=0)
        most_keys = max((s.end for s in spans), default=0)
        return Sequences(to_device(table.contiguous(), device), most_rows, most_keys)


@triton.jit
def load_sequence(sequences, stride_field, index):
    """Return what the table `sequences` int32 `[5, S]` says of sequence `index`: batch, key_start,
    row_start, rows and position, int32 scalars."""
    at = sequences + index
    batch = tl.load(at)
    key_start = tl.load(at + stride_field)
    row_start = tl.load(at + 2 * stride_field)
    rows = tl.load(at + 3 * stride_field)
    position = tl.load(at + 4 * stride_field)
    return batch, key_start, row_start, rows, position


@triton.jit
def query_block(row_start, rows, position, index, BLOCK_Q: tl.constexpr):
    """Return the `index`-th query block of a sequence, in int32 scalars: its first row in the query
    tensor, and the positions of its first and last row. It is empty (`first > last`) where the
    sequence has fewer."""
    low = (position // BLOCK_Q + index) * BLOCK_Q
    first = tl.maximum(low, position)
    last = tl.minimum(low + BLOCK_Q, position + rows) - 1
    return row_start + first - position, first, last


@triton.jit
def always_read(first, window, sink_keys, sliding, BLOCK_K: tl.constexpr):
    """What a query block whose first row is at `first` always reads: the sink `[start, sink_end)`
    and the window `[window, ...]`; the candidates are key blocks `sink_end // BLOCK_K` to
    `window // BLOCK_K - 1` (`QueryBlock` in `geometry.py`).

    `window` is where the window starts if no sliding window cuts it (`window_start`, or, in decode,
    what the selection kept); `sliding` 0 means no sliding window.
    """
    start = tl.where(sliding > 0, tl.maximum(first - sliding + 1, 0) // BLOCK_K * BLOCK_K, 0)
    window = tl.maximum(window, start)
    sink_end = tl.minimum(tl.maximum((sink_keys + BLOCK_K - 1) // BLOCK_K * BLOCK_K, start), window)
    return start, sink_end, window


@triton.jit
def window_start(first, window_keys, BLOCK_K: tl.constexpr):
    """Return where the window of a query block starts when it is laid out anew. All are scalars."""
    return tl.maximum(first - window_keys, 0) // BLOCK_K * BLOCK_K


@triton.jit
def still_serves(made, position, rows, refresh):
    """Whether the selection that was made for the position that the pointer `made` holds serves a
    step of one row at `position` as well. All else are scalars."""
    age = position - tl.load(made)
    return (rows == 1) & (age >= 0) & (age < refresh)


@triton.jit
def page_of(slots, inside, batch, table, stride_table, PAGE_SIZE: tl.constexpr):
    """Return the pages `[N]` that `offsets_in` asks for, of tokens in `slots` `[N]` (int32, counted
    from the batch row's first slot: `key_start` plus position). Where `inside` `[N]` is false no
    page is looked up. `PAGE_SIZE` 0: keys are contiguous, a batch row is one page."""
    if PAGE_SIZE > 0:
        return tl.load(
            table + batch.to(tl.int64) * stride_table + slots // PAGE_SIZE, mask=inside, other=0
        )
    else:
        return batch


@triton.jit
def offsets_in(page, slots, stride_batch, stride_token, PAGE_SIZE: tl.constexpr):
    """Return int64 offsets `[N]`, from a head's first element, of the tokens in `slots` `[N]` that
    lie in `page` `[N]`."""
    if PAGE_SIZE > 0:
        slots = slots % PAGE_SIZE
    return page.to(tl.int64) * stride_batch + slots.to(tl.int64) * stride_token


@triton.jit
def token_offsets(
    slots, inside, batch, stride_batch, stride_token, table, stride_table, PAGE_SIZE: tl.constexpr
):
    """Return int64 offsets `[N]`, from a head's first element, of the tokens in `slots` `[N]`, with
    their pages looked up at once."""
    page = page_of(slots, inside, batch, table, stride_table, PAGE_SIZE)
    return offsets_in(page, slots, stride_batch, stride_token, PAGE_SIZE)
