"""Where keys and values lie: contiguous `[B, Hkv, T, D]` with any strides, or pages behind a block
table. One helper for both.

Offsets are int64: a cache may hold more than 2**31 elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


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
