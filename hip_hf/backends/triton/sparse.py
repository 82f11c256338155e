"""The sparse path on a GPU, as `torch/sparse.py`: a few launches per call, none of which waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from hip_hf.backends.base import BlockSparseCall, steps_of
from hip_hf.backends.triton.attention.backward import attend_with_gradients
from hip_hf.backends.triton.attention.decode import DecodeScratch, decode, decode_once, splits_for
from hip_hf.backends.triton.attention.prefill import prefill
from hip_hf.backends.triton.common.arguments import Operands, Part, Reads, dense_reads
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.dense import dense_rows, operands, sequences_of
from hip_hf.backends.triton.pyramid import KeyPyramid
from hip_hf.backends.triton.selection import search
from hip_hf.backends.triton.selection.search import SelectionBuffers, select
from hip_hf.cache.pages import PagedTensor
from hip_hf.geometry import DECODE_ROWS, Span, mask_heads
from hip_hf.methods import streaming
from hip_hf.methods.base import options_of
from hip_hf.problem import AttentionProblem
from hip_hf.state import DecodeState, KeptSelection, RowState

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig

# A pyramid starts with room for this much more than its prompt (a fraction of it, and keys at
# least), and doubles when that is full.
ROOM, LEAST_ROOM = 0.125, 4096
# Kernels run on CPU tensors then.
INTERPRETED = triton.knobs.runtime.interpret
# The widest head whose tiles fit on every target.
MOST_DIM = 256


def by_batch_row(spans: tuple[Span, ...], batch: int) -> tuple[Span, ...] | None:
    """One span per batch row, in order, empty where a row has none; None if rows are packed."""
    rows = {span.batch: span for span in spans}
    if len(rows) < len(spans):
        return None
    return tuple(rows.get(b, Span(b, 0, 0, 0, 0, 0)) for b in range(batch))


def step_scratch(config: HiPConfig, q: Tensor, key_heads: int, dim_v: int) -> DecodeScratch:
    """Scratch for decode steps with queries like q `[B, Hq, 1, D]`; a window that is kept grows
    until the next selection."""
    keys = config.sparse_reach + steps_of(config)
    return DecodeScratch.make(splits_for(q, key_heads, q.shape[0], keys), q, dim_v)


@dataclass
class DeviceState:
    """What decode keeps on the device for the `batch` rows of a cache. `pyramid` None: the method
    searches nothing.

    Kernels read and write it in place, so the steps on it can be captured in a CUDA graph and
    replayed. `even`: in the last call that the host saw all rows ended at the same slot, so that a
    batch is padded on the left if at all.
    """

    pyramid: KeyPyramid | None
    selection: SelectionBuffers
    scratch: DecodeScratch
    even: bool = False

    @staticmethod
    def make(config: HiPConfig, problem: AttentionProblem, capacity: int) -> DeviceState:
        """For up to `capacity` keys a row, of the shapes, dtype and device of `problem`."""
        q, k, v = problem.q, problem.k, problem.v
        with torch.inference_mode(False):  # it outlives the mode it is made in
            pyramid = None
            if config.method == "hip":
                shape = (q.shape[0], k.shape[1], q.shape[3], capacity)
                pyramid = KeyPyramid.empty(config, shape, q)
            rows = (q.shape[0], mask_heads(config, q.shape[1], k.shape[1]), 1)
            selection = SelectionBuffers.empty(config, rows, q.device, keep=True)
            scratch = step_scratch(config, q[:, :, :1], k.shape[1], v.shape[3])
            state = DeviceState(pyramid, selection, scratch)
            for x in state.tensors():
                # graphs of `torch.compile` need not copy them to write to them
                torch._dynamo.mark_static_address(x, guard=False)
            return state

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what kernels write for later steps, of the shapes in `KeyPyramid` and
        `SelectionBuffers`: table, states and built of the pyramid, if there is one, and the
        selection."""
        pyramid, kept = self.pyramid, self.selection
        assert kept.made is not None
        summaries = () if pyramid is None else (pyramid.table, pyramid.states, pyramid.built)
        return (*summaries, kept.indices, kept.counts, kept.window_start, kept.made)

    @property
    def batch(self) -> int:
        """Return the number of batch rows."""
        return self.selection.counts.shape[0]

    @property
    def capacity(self) -> int:
        return 0 if self.pyramid is None else self.pyramid.blocks * self.pyramid.config.block_k

    def holds(self, keys: int) -> bool:
        """Whether there is room for a row of `keys` keys."""
        return self.pyramid is None or keys // self.pyramid.config.block_k <= self.pyramid.blocks

    def take(self, old: DeviceState) -> None:
        """Go on where a smaller one was."""
        if self.pyramid is not None and old.pyramid is not None:
            self.pyramid.take(old.pyramid)
        self.selection = old.selection

    def crop(self, batch: int, keys: int) -> None:
        """Of the batch row's keys the first `keys` are left; its next step selects anew."""
        self.select_anew(batch)
        if self.pyramid is not None:
            self.pyramid.built[batch].clamp_(max=keys // self.pyramid.config.block_k)

    def select_anew(self, batch: int) -> None:
        """Let the next step of the batch row `batch` select anew."""
        assert self.selection.made is not None
        self.selection.made[batch].fill_(SelectionBuffers.NEVER)

    @torch.inference_mode(False)  # it outlives the mode it is reordered in
    def reorder(self, indices: list[int]) -> None:
        """Batch row `b` continues what row `indices[b]` was."""
        index = torch.tensor(indices, device=self.selection.counts.device)
        if self.pyramid is not None:
            self.pyramid.reorder(index)
        blocks, counts, window, made = (x[index] for x in self.tensors()[-4:])
        self.selection, scratch = SelectionBuffers(blocks, counts, window, made), self.scratch
        shape = (scratch.out.shape[0], len(indices), *scratch.out.shape[2:])
        self.scratch = DecodeScratch(
            scratch.out.new_empty(shape), scratch.lse.new_empty(shape[:-1])
        )


def reads_of(config: HiPConfig, selection: SelectionBuffers, block_q: int) -> Reads:
    """What the query blocks of a selection read."""
    searched, kept = config.method == "hip", selection.made is not None
    indices, counts = (selection.indices, selection.counts) if searched else (None, None)
    windows = selection.window_start[:, 0] if kept else None
    sizes = (config.block_k, config.sink, config.window)
    return Reads(block_q, *sizes, indices, counts, windows)


def keep_window(config: HiPConfig, sequences: Sequences, selection: SelectionBuffers) -> None:
    """Keep the window's start between refreshes for a method that selects nothing."""
    made, window = selection.made, selection.window_start
    assert made is not None
    position = sequences.table[4][:, None, None]
    old = (position < made) | (position - made >= steps_of(config))
    made.copy_(torch.where(old, position, made))
    anew = (position - config.window).clamp(min=0) // config.block_k * config.block_k
    window.copy_(torch.where(old, anew, window))


def select_blocks(
    x: Operands, sequences: Sequences, config: HiPConfig, block_q: int, pyramid: KeyPyramid | None
) -> SelectionBuffers:
    """What every query block of `block_q` rows of a call reads, in a new selection. A method that
    does not search leaves it unwritten.

    `pyramid`: the one that decode steps keep, or None to build one for this call alone.
    """
    q, kv = x.q, x.kv
    shape = (sequences.count, mask_heads(config, q.shape[1], kv.heads), sequences.blocks(block_q))
    selection = SelectionBuffers.empty(config, shape, q.device)
    if config.method == "hip":
        append = pyramid is not None and q.shape[2] <= DECODE_ROWS  # only few keys are missing
        if pyramid is None:
            size = (sequences.count, kv.heads, q.shape[3], sequences.max_keys)
            pyramid = KeyPyramid.empty(config, size, q)
        pyramid.extend(kv, sequences, block_q, append)
        select(q, pyramid.table, kv, sequences, config, x.logits, block_q, selection)
    return selection


def attend_parts(x: Operands, parts: tuple[Part, ...], keys: int) -> None:
    """Attention of the rows of all `parts` to what they read, without gradients. Up to
    `DECODE_ROWS` query rows are one part. Each of them reads up to `keys` keys, which are many for
    so few rows, so they are split over the device."""
    if x.q.shape[2] > DECODE_ROWS:
        for part in parts:
            prefill(x, part)
    else:
        (part,) = parts
        decode_once(x, part, keys)


def decode_step(
    x: Operands, sequences: Sequences, config: HiPConfig, state: DeviceState, serves: bool = False
) -> None:
    """One query row of each batch row: extend the pyramid, select if the selection is
    `decode_refresh` steps old, attend. `serves`: the host knows that no selection is that old, so
    nothing is launched for the first two.

    `sequences` has one entry per batch row, whose position may be advanced on the device: nothing
    here depends on it on the host. Launches and shapes are the same at every step, and all memory
    is there before, so a CUDA graph can hold it.
    """
    selection, pyramid = state.selection, state.pyramid
    if not serves and pyramid is None:
        keep_window(config, sequences, selection)
    elif not serves and pyramid is not None:
        pyramid.extend(x.kv, sequences, 1, append=True)
        select(x.q, pyramid.table, x.kv, sequences, config, x.logits, 1, selection)
    decode(x, Part(sequences, reads_of(config, selection, 1)), state.scratch)


class SparseAttention(BlockSparseCall):
    """One call of the sparse path on a GPU."""

    lse: Tensor | None

    def run(self, state: DecodeState | None) -> None:
        problem = self.problem
        if state is not None:
            state.bind(self.config, problem.k)
        by_row, kept = by_batch_row(problem.spans, problem.q.shape[0]), None
        if state is not None and by_row is not None:
            kept = self._device_state(state, by_row)
        spans = by_row or problem.spans
        self.sequences = sequences_of(spans, problem.q.device)
        self.operands = operands(problem, self.out, self.lse)
        if state is None or kept is None or problem.q.shape[2] > 1 or problem.needs_grad:
            self._rows(spans, state, kept)
        else:
            self.windows = self._step(state, kept)
            self._note_all(spans, kept.selection)

    def _step(self, state: DecodeState, kept: DeviceState) -> list[int | None]:
        """A decode step of one row. Returns where the window of each span starts. How old
        selections are is known to the host as well as to the device: while all of them serve,
        nothing is launched for them."""
        rows = [state.rows[span.batch] for span in self.problem.spans]
        serve = [self._serves(*both) for both in zip(self.problem.spans, rows, strict=True)]
        decode_step(self.operands, self.sequences, self.config, kept, all(serve))
        return [None if row.selection is None else row.selection.window_start for row in rows]

    def _serves(self, span: Span, row: RowState) -> bool:
        """Whether a batch row's selection still serves; if not, that of this step replaces it."""
        old = row.selection
        if old is not None and 0 <= span.position - old.position < steps_of(self.config):
            return True
        row.selection = KeptSelection(None, self._blocks(span)[0].window_start, span.position)
        return False

    def _device_state(self, state: DecodeState, spans: tuple[Span, ...]) -> DeviceState:
        """The state's tables, with room for all keys; rows that continue nothing start afresh."""
        problem = self.problem
        rows: dict[int, RowState] = {
            s.batch: state.row(s.batch, s.key_start, s.position, s.end) for s in spans if s.rows
        }
        kept = state.device
        assert kept is None or isinstance(kept, DeviceState)
        if kept is None or kept.batch != problem.q.shape[0]:
            kept = None
            for row in rows.values():
                row.on_device = False
        if kept is None or not kept.holds(problem.longest):
            # room to grow: a new table costs O(T), so it must be rare
            room, old = problem.longest + max(int(problem.longest * ROOM), LEAST_ROOM), kept
            capacity = max(room, problem.k.shape[2], 0 if old is None else 2 * old.capacity)
            state.device = kept = DeviceState.make(self.config, problem, capacity)
            if old is not None:
                kept.take(old)
        for batch, row in rows.items():
            if not row.on_device:
                kept.crop(batch, 0)
                row.on_device, row.selection = True, None
        kept.even = len({span.key_start + span.end for span in spans}) == 1
        return kept

    def _rows(
        self, spans: tuple[Span, ...], state: DecodeState | None, kept: DeviceState | None
    ) -> None:
        """Prefill, and decode of several rows or without a state: select for every query block of
        the call, and attend."""
        problem, config = self.problem, self.config
        block_q = 1 if self.decoding else config.block_q
        pyramid = None if kept is None else kept.pyramid
        selection = select_blocks(self.operands, self.sequences, config, block_q, pyramid)
        if state is not None and kept is not None:
            for span in spans:
                state.select_anew(span.batch)
        self._note_all(spans, selection)
        tails = [self.tail(span) for span in spans]
        parts = self._parts(spans, tails, reads_of(config, selection, block_q))
        if problem.needs_grad:
            self.out, lse = attend_with_gradients(self.operands, parts, config)
            self.lse = None if self.lse is None else lse
            return
        attend_parts(self.operands, parts[:1], config.sparse_reach)
        if len(parts) > 1:
            # the host knows where the dense rows are, so their keys can be split over the device
            dense_rows(self.operands, spans, tails, problem.longest)

    def _parts(self, spans: tuple[Span, ...], tails: list[int], reads: Reads) -> tuple[Part, ...]:
        """The rows that select, and those from `tails` on in each prompt, which are dense."""
        if tails == [span.rows for span in spans]:
            return (Part(self.sequences, reads),)
        device, head, tail = self.problem.q.device, [], []
        for span, first in zip(spans, tails, strict=True):
            head.append(span.part(span.position, span.position + first))
            tail.append(span.part(span.position + first, span.end))
        dense = Part(sequences_of(tuple(tail), device), dense_reads())
        return Part(sequences_of(tuple(head), device), reads), dense

    def _note_all(self, spans: tuple[Span, ...], selection: SelectionBuffers) -> None:
        """Put down in the mask what was selected."""
        if self.mask is None or self.config.method != "hip":
            return
        for s, span in enumerate(spans):
            count = len(self._blocks(span))
            self.mask.indices[span.batch, :, :count] = selection.indices[s, :, :count]
            self.mask.counts[span.batch, :, :count] = selection.counts[s, :, :count]


def unsupported(problem: AttentionProblem, config: HiPConfig) -> str:
    """Why the kernels cannot serve a call of the sparse path; empty if they can."""
    if config.method not in ("hip", "streaming", "hyper"):
        return f"method {config.method} has no kernels"
    if config.method == "streaming" and options_of(config, streaming.Options).recent:
        return "streaming with `recent` has no kernels (without it, `window` may be as much longer)"
    if config.delta == 1:
        return "with delta=1 every row is dense, which has no kernels"
    if reason := unsupported_tensors(problem):
        return reason
    if config.method == "hyper" and isinstance(problem.k, PagedTensor):
        return "method hyper has no kernels for keys and values in pages"
    return search.unsupported_search(config) if config.method == "hip" else ""


def unsupported_tensors(problem: AttentionProblem) -> str:
    """Why the kernels cannot serve tensors like these; empty if they can."""
    q, k, v = problem.q, problem.k, problem.v
    if q.device.type != "cuda" and not INTERPRETED:
        return f"kernels run on a GPU, the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{q.dtype} has no kernels".replace("torch.", "")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[3] > MOST_DIM:
            return f"head dim {x.shape[3]} of {name} is above {MOST_DIM}"
        if x.stride(3) != 1:
            return f"the last dimension of {name} is not contiguous"
    paged = [x for x in (k, v) if isinstance(x, PagedTensor)]
    if len(paged) == 1:
        return "keys or values alone are in pages"
    if any(x.store.pages() is None for x in paged):
        return "the cache's pages are not one piece of device memory"
    return ""
