"""What a backend offers: executors, one for each kind of attention, and what those of all backends
share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hip_hf.backends.keys_read import Count, blocks_of, of_blocks, share_of
from hip_hf.geometry import DECODE_ROWS, BlockMask, QueryBlock, Span, mask_heads
from hip_hf.methods.base import selector_for
from hip_hf.problem import AttentionProblem

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.state import DecodeState


@dataclass(frozen=True)
class Piece:
    """What a few query blocks of a span read, for the key heads `heads`: sink, window and the key
    blocks `ids` `[heads, S, len(blocks), n]` of `block_k` keys, or (None) all from
    `QueryBlock.start` on. Rows from `rows` on do not count."""

    span: Span
    heads: slice
    blocks: list[QueryBlock]
    ids: Tensor | None
    block_k: int
    rows: int

    def positions(self, head: int, share: int, i: int) -> Tensor:
        """Of the keys that the query heads `share` of key head `head` read in query block `i`;
        relative to the span."""
        block = self.blocks[i]
        if self.ids is None:
            return torch.arange(block.start, block.last + 1, device="cpu")
        chosen = self.ids[head - self.heads.start, share, i].cpu()
        picked = (
            chosen[:, None] * self.block_k + torch.arange(self.block_k, device="cpu")
        ).flatten()
        always = ((block.start, block.sink_end), (block.window_start, block.last + 1))
        sink, window = (torch.arange(first, end, device="cpu") for first, end in always)
        return torch.cat([sink, picked, window])


class Executor(Protocol):
    """Computes one call of the sparse path into `out` `[B, Hq, Tq, Dv]` and, if given, `lse`
    `[B, Hq, Tq]`."""

    out: Tensor
    pieces: (
        list[Piece] | None
    )  # put down what was read here, where gradients are wanted (`has_gradients`)

    @property
    def lse(self) -> Tensor | None:
        """As it was given; a new one where autograd is to know it."""

    @property
    def count(self) -> Count:
        """Of the call, once it has run."""

    @property
    def mask(self) -> BlockMask | None:
        """The key blocks that were read, where that was asked for and the method selects any."""

    def run(self, state: DecodeState | None) -> None:
        """Compute the call; `state` is what decode steps keep, and follows."""


@dataclass
class Result:
    """What an attention call computed, and how: `path` is `sparse` or `dense`. `reason`: why dense,
    or not corrected as asked."""

    out: Tensor
    lse: Tensor | None
    mask: BlockMask | None
    path: str
    reason: str
    count: Count | None  # of the keys that were read; None: all that are in sight
    unsupported: bool = (
        False  # dense because the sparse path lacks something, not because it was asked for
    )

    @property
    def share(self) -> float:
        """Of the visible keys, how many were read: counted here."""
        return share_of(self.count)


def kind_of(config: HiPConfig) -> str:
    """The kind of attention that settings ask for: `delta` (a correction of another kind), `hyper`
    or `block_sparse`."""
    return (
        "delta"
        if config.delta is not None
        else "hyper"
        if config.method == "hyper"
        else "block_sparse"
    )


def has_gradients(config: HiPConfig) -> bool:
    """Whether gradients can flow through the attention that settings ask for."""
    return kind_of(config) == "block_sparse"


def steps_of(config: HiPConfig) -> int:
    """Decode steps that one selection serves; of a method in stages, that of its first stage."""
    steps = config.decode_refresh
    return steps if isinstance(steps, int) else steps[0]


def pick(
    executors: Mapping[str, Callable[..., Executor]], config: HiPConfig
) -> Callable[..., Executor]:
    """What makes the executor of a call, from `(problem, config, out, lse,
    mask)`: one of a backend's `executors`, by kind."""
    found = executors[kind_of(config)]
    return (
        found
        if config.delta is None
        else partial(found, pick(executors, replace(config, delta=None)))
    )


class Attend(Protocol):
    """`hip_hf.attention.attend`."""

    def __call__(
        self, problem: AttentionProblem, config: HiPConfig, layer: int | None = None, state: DecodeState | None = None,
        need_lse: bool = False, need_mask: bool = False,
    ) -> Result: ...  # fmt: skip


def _missing(*_: object, **__: object) -> Result:
    raise RuntimeError("hip_hf.attention has not been imported")


attend: Attend = _missing  # the self-test of kernels compares whole calls: `hip_hf.attention`, which is above, puts its own here


class BlockSparseCall:
    """A call in which every query block reads what a selector picks: problem, settings and
    results."""

    def __init__(
        self,
        problem: AttentionProblem,
        config: HiPConfig,
        out: Tensor,
        lse: Tensor | None,
        mask: bool,
    ) -> None:
        self.problem, self.config, self.out, self.lse = problem, config, out, lse
        self.selector = selector_for(config)
        self.budget = self.selector.budget
        # of each span, where the window of its only row starts, if an earlier selection says so
        self.windows: list[int | None] = [None] * len(problem.spans)
        self.mask = self._empty_mask() if mask else None
        self.pieces: list[Piece] | None = (
            None  # a list to put down what was read, where gradients are wanted
        )

    @property
    def decoding(self) -> bool:
        return self.problem.q.shape[2] <= DECODE_ROWS

    @property
    def count(self) -> Count:
        problem = self.problem
        told = (problem.spans, self.windows, self.decoding, problem.sliding_window)
        return partial(of_blocks, self.config, self.budget, *told)

    def _blocks(self, span: Span, window: int | None = None) -> list[QueryBlock]:
        """As `blocks_of`."""
        return blocks_of(self.config, span, self.decoding, self.problem.sliding_window, window)

    def _empty_mask(self) -> BlockMask:
        problem, config = self.problem, self.config
        batch, device = problem.q.shape[0], problem.q.device
        most = max(len(self._blocks(span)) for span in problem.spans)
        heads = mask_heads(config, problem.q.shape[1], problem.k.shape[1])
        indices = torch.zeros(batch, heads, most, self.budget, dtype=torch.int32, device=device)
        counts = torch.zeros(batch, heads, most, dtype=torch.int32, device=device)
        first = torch.full((batch, most), -1, dtype=torch.int32, device=device)
        for span in problem.spans:
            at = [block.first for block in self._blocks(span)]
            first[span.batch, : len(at)] = torch.tensor(at, dtype=torch.int32, device=device)
        return BlockMask(indices, counts, first, config.block_q, config.block_k)
