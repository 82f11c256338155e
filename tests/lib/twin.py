"""A `DecodeState` beside the plain knowledge of what its steps must read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import assert_near, eager, make_qkv, read_mask, sparse

from hip_hf.config import HiPConfig
from hip_hf.geometry import BlockMask
from hip_hf.state import DecodeState


@dataclass
class Kept:
    """A selection that later steps may reuse: blocks by query head, the window's start, and the row
    it was made for."""

    blocks: list[torch.Tensor]
    window_start: int
    position: int


@dataclass
class Twin:
    """A batch of growing sequences, its `DecodeState` under test, and the plain knowledge of what
    must come out."""

    config: HiPConfig
    pads: list[int]
    fields: dict[str, Any] = field(default_factory=dict)
    heads: int = 2
    groups: int = 2
    dim: int = 8

    def __post_init__(self) -> None:
        self.state = DecodeState()
        self.kept: list[Kept | None] = [None] * len(self.pads)
        self.k = self.v = torch.empty(len(self.pads), self.heads, 0, self.dim, dtype=torch.float64)
        self.reused = 0

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @property
    def starts(self) -> list[int]:
        """First real keys; a row of which only padding has come so far has none."""
        return [min(pad, self.length) for pad in self.pads]

    def call(self, rows: int) -> None:
        """New tokens for every sequence; the output must be right."""
        q, k, v = make_qkv(
            rows, None, len(self.pads), self.heads, self.groups, self.dim, dtype=torch.float64
        )
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        got = sparse(
            q,
            self.k,
            self.v,
            self.config,
            self.starts,
            state=self.state,
            need_mask=False,
            **self.fields,
        )
        read = self.reads(q)
        out, lse = eager(
            q,
            self.k,
            self.v,
            read,
            **{n: x for n, x in self.fields.items() if n != "sliding_window"},
        )
        assert_near(got.out, out, 1e-10)
        assert_near(got.lse, lse, 1e-10, "lse")

    def reads(self, q: torch.Tensor) -> torch.Tensor:
        """What this call must read, `[B, Hq, Tq, Tk]`."""
        read = torch.zeros(*q.shape[:3], self.length, dtype=torch.bool)
        fresh: BlockMask | None = None
        for b, start in enumerate(self.starts):
            last, kept = self.length - 1 - start, self.kept[b]
            if (
                q.shape[2] == 1
                and kept is not None
                and last - kept.position < self.config.decode_refresh
            ):
                read[b, :, 0] = self.again(kept, start, last)
                self.reused += 1
                continue
            if fresh is None:
                fresh = sparse(
                    q, self.k, self.v, self.config, self.starts, state=DecodeState(), **self.fields
                ).mask
                anew = read_mask(
                    fresh,
                    self.config,
                    q,
                    self.k,
                    self.starts,
                    sliding=self.fields.get("sliding_window"),
                )
            read[b], self.kept[b] = anew[b], None
            if min(q.shape[2], last + 1) <= 16 and last >= 0:  # a step, for this sequence
                row = int((fresh.first[b] == last).nonzero())
                heads = [h * fresh.indices.shape[1] // q.shape[1] for h in range(q.shape[1])]
                blocks = [fresh.indices[b, h, row, : fresh.counts[b, h, row]].long() for h in heads]
                bk = self.config.block_k
                self.kept[b] = Kept(blocks, max(0, last - self.config.window) // bk * bk, last)
        return read

    def again(self, kept: Kept, start: int, last: int) -> torch.Tensor:
        """Sink, the old selection, and everything since the old window's start, `[Hq, Tk]`."""
        at, bk = torch.arange(self.length) - start, self.config.block_k
        sliding = self.fields.get("sliding_window") or self.length
        seen = (at >= 0) & (at <= last) & (at > last - sliding)
        always = (at < -(-self.config.sink // bk) * bk) | (at >= kept.window_start)
        return torch.stack(
            [seen & (always | torch.isin(at // bk, blocks)) for blocks in kept.blocks]
        )

    def crop(self, length: int) -> None:
        self.state.crop(length)
        if length < self.length:
            self.kept = [None] * len(self.pads)
        self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]

    def reorder(self, indices: list[int]) -> None:
        self.state.reorder(torch.tensor(indices))
        self.take(indices)

    def repeat(self, repeats: int) -> None:
        self.state.repeat(repeats)
        self.take([b for b in range(len(self.pads)) for _ in range(repeats)])

    def take(self, indices: list[int]) -> None:
        self.k, self.v = self.k[indices], self.v[indices]
        self.pads, self.kept = [self.pads[i] for i in indices], [self.kept[i] for i in indices]

    def reset(self) -> None:
        self.state.reset()
        self.kept = [None] * len(self.pads)
        self.k, self.v = self.k[:, :, :0], self.v[:, :, :0]
