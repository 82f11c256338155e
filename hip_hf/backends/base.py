"""What a backend offers: executors, one for each kind of attention, and what those of all backends
share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hip_hf.backends.keys_read import Count, blocks_of, density_of, of_blocks
from hip_hf.geometry import DECODE_ROWS, BlockMask, QueryBlock, Span, mask_heads
from hip_hf.methods.base import selector_for
from hip_hf.problem import AttentionProblem

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.state import DecodeState


@dataclass(frozen=True, eq=False)
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

    def positions(self, head: int, mask: int, i: int) -> Tensor:
        """Return the positions `[n]`, relative to the span, of the keys that query block `i`
        reads by the mask number `mask` of key head `head`."""
        block = self.blocks[i]
        if self.ids is None:
            return torch.arange(block.start, block.last + 1, device="cpu")
        chosen = self.ids[head - self.heads.start, mask, i].cpu()
        picked = (
            chosen[:, None] * self.block_k + torch.arange(self.block_k, device="cpu")
        ).flatten()
        always = ((block.start, block.sink_end), (block.window_start, block.last + 1))
        sink, window = (torch.arange(first, end, device="cpu") for first, end in always)
        return torch.cat([sink, picked, window])


@dataclass(eq=False)
class Executor:
    """One call of the sparse path, computed into `out` `[B, Hq, Tq, Dv]` and, if given, `lse`
    `[B, Hq, Tq]`.

    `mask`: the key blocks that were read, where that is asked for (`need_mask`) and the method
    selects any. `pieces`: a list to put down what was read, where gradients are wanted
    (`has_gradients`).
    """

    problem: AttentionProblem
    config: HiPConfig
    out: Tensor
    lse: Tensor | None
    need_mask: bool
    mask: BlockMask | None = field(default=None, init=False)
    pieces: list[Piece] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Make what a kind of attention needs besides."""

    @property
    def decoding(self) -> bool:
        """Return whether the call is a decode step, in which every row selects for itself."""
        return self.problem.q.shape[2] <= DECODE_ROWS

    def tail(self, span: Span) -> int:
        """The first of the span's rows that are dense for being the last of a prompt."""
        return span.rows if self.decoding else max(0, span.rows - self.config.dense_tail)

    @property
    def count(self) -> Count:
        """Return the count of the keys that the call reads, once it has run."""
        raise NotImplementedError

    def run(self, state: DecodeState | None) -> None:
        """Compute the call; `state` is what decode steps keep, and follows."""
        raise NotImplementedError


@dataclass(eq=False)
class Result:
    """What an attention call computed, and how: `path` is `sparse` or `dense`. `reason`: why
    dense."""

    out: Tensor
    lse: Tensor | None
    mask: BlockMask | None
    path: str
    reason: str
    count: Count | None  # of the keys that were read; None: all that are in sight
    # dense because the sparse path lacks something, not because it was asked for
    unsupported: bool = False

    @property
    def density(self) -> float:
        """Return the fraction of the visible keys that were read. It is counted here."""
        return density_of(self.count)


def kind_of(config: HiPConfig) -> str:
    """The kind of attention that settings ask for: `delta` (a correction of another kind), `hyper`
    or `block_sparse`."""
    if config.delta is not None:
        return "delta"
    return "hyper" if config.method == "hyper" else "block_sparse"


def has_gradients(config: HiPConfig) -> bool:
    """Whether gradients can flow through the attention that settings ask for."""
    return kind_of(config) == "block_sparse"


def steps_of(config: HiPConfig) -> int:
    """Decode steps that one selection serves; of a method in stages, that of its first stage."""
    steps = config.decode_refresh
    return steps if isinstance(steps, int) else steps[0]


# What makes the executor of a call, from the fields of `Executor`.
MakeExecutor = Callable[[AttentionProblem, "HiPConfig", Tensor, Tensor | None, bool], Executor]


@dataclass(frozen=True, eq=False)
class Executors:
    """A backend's executors, by the kinds that `kind_of` tells apart. `delta`: what corrects
    another attention, given what makes that one's executor."""

    block_sparse: MakeExecutor
    hyper: MakeExecutor
    delta: Callable[[MakeExecutor], MakeExecutor]

    def pick(self, config: HiPConfig) -> MakeExecutor:
        """What makes the executor of a call with these settings."""
        kind = kind_of(config)
        if kind == "delta":
            return self.delta(self.pick(replace(config, delta=None)))
        return self.hyper if kind == "hyper" else self.block_sparse


class Attend(Protocol):
    """A whole call of attention, as `hip_hf.attention.attend` makes it."""

    def __call__(
        self,
        problem: AttentionProblem,
        config: HiPConfig,
        layer: int | None = None,
        state: DecodeState | None = None,
        need_lse: bool = False,
        need_mask: bool = False,
    ) -> Result: ...


def _missing(*_: object, **__: object) -> Result:
    raise RuntimeError("hip_hf.attention has not been imported")


# `hip_hf.attention` puts its own here: the self-test of kernels compares whole calls, and is below
# it.
attend: Attend = _missing


class BlockSparseCall(Executor):
    """A call in which every query block reads what a selector picks."""

    def __post_init__(self) -> None:
        self.selector = selector_for(self.config)
        self.budget = self.selector.budget
        # of each span, where the window of its only row starts, if an earlier selection says so
        self.windows: list[int | None] = [None] * len(self.problem.spans)
        if self.need_mask:
            self.mask = self._empty_mask()

    @property
    def count(self) -> Count:
        problem = self.problem
        told = (problem.spans, self.windows, self.decoding, problem.sliding_window)
        return partial(of_blocks, self.config, self.budget, *told)

    def _blocks(self, span: Span, window: int | None = None) -> list[QueryBlock]:
        """Return the query blocks of a span, as `blocks_of` does."""
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
