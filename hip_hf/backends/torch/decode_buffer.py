"""What the decode steps under one selection read, side by side: gathered at the first of them, one
row longer at each other.

A selection serves `decode_refresh` steps. Their sink and selected blocks are the same, and the
window only grows by each step's own key; picking them out of the cache anew would cost a step more
than its attention does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.backends.base import Result
from hip_hf.backends.keys_read import known
from hip_hf.backends.tensors import Tensors
from hip_hf.backends.torch.softmax import add_sink_logits, weigh_values
from hip_hf.cache.pages import pick, rows_of
from hip_hf.geometry import QueryBlock
from hip_hf.methods.ranking import squash
from hip_hf.workers import compute_dtype, scratch

if TYPE_CHECKING:
    from hip_hf.config import HiPConfig
    from hip_hf.problem import AttentionProblem
    from hip_hf.state import DecodeState, KeptSelection, RowState

# A buffer that is full grows by `1 / GROWTH` of its rows, and by `GROWTH` rows at least.
GROWTH = 8


class DecodeBuffer:
    """Buffers `[Hkv, room, D]` and `[Hkv, room, Dv]` in the dtype that is multiplied in; the first
    `count` rows are keys and values of selected blocks, sink and window, in this order, values
    behind them are zero. Under context extension keys are rotated to their places, those of the
    selected blocks between sink and window. A step's own key comes with its `attend`."""

    def __init__(self, room: int, t: Tensors) -> None:
        heads, dtype, device = t.k.shape[0], compute_dtype(t.q), t.q.device
        self.selection: KeptSelection | None = None  # that it was filled for
        self.position = self.count = 0  # one past the last position in it; rows in use
        self.k = torch.empty(heads, 0, t.k.shape[-1], dtype=dtype, device=device)
        self.v = torch.empty(heads, 0, t.v.shape[-1], dtype=dtype, device=device)
        self.first = room
        self._take_room(room)
        self.until = 0  # position of the first step that is to select anew

    def _take_room(self, room: int) -> None:
        """Make room for `room` rows and keep those in use. What a selection reads grows with every
        step that it serves, and it may be made to serve any number of steps."""
        with torch.inference_mode(False):  # they outlive the mode they were made in
            self.k, self.v = (
                torch.cat(
                    [x[:, : self.count], x.new_zeros(len(x), room - self.count, x.shape[2])], 1
                )
                for x in (self.k, self.v)
            )

    def holds(self, selection: KeptSelection | None, position: int) -> bool:
        """Whether the step at `position` under `selection` has only to add its own key."""
        mine = self.selection is not None and self.selection is selection
        return mine and self.position == position

    def serves(self, selection: KeptSelection | None, position: int) -> bool:
        """Whether it holds the step at `position`, and nothing is to be selected for it."""
        return position < self.until and self.holds(selection, position)

    def fill(
        self, t: Tensors, selection: KeptSelection, block: QueryBlock, size: int, until: int
    ) -> None:
        """Bring what the step `block` reads under `selection` beside its own key, of key blocks of
        `size` keys. The selection holds `until` then."""
        assert selection.ids is not None
        self.selection = None  # until all is there
        ids = selection.ids[:, 0, 0]
        sink, picked = block.sink_end - block.start, ids.shape[1] * size
        count = sink + picked + block.last + 1 - block.window_start
        if not count <= self.k.shape[1] <= count + max(self.first, count // GROWTH):
            self.count = 0  # what was gathered is not needed
            self._take_room(max(count, self.first))
        self.count = count - 1
        for name, x, into in (("k", t.k, self.k), ("v", t.v, self.v)):
            chosen = into[:, :picked]
            if x.dtype == into.dtype:
                pick(x, ids, size, chosen)
            else:
                like = into.new_empty(0, dtype=x.dtype)
                raw = scratch.take(name, tuple(chosen.shape), like)
                chosen.copy_(pick(x, ids, size, raw))
            into[:, picked : picked + sink] = x[:, block.start : block.sink_end]
            into[:, picked + sink : self.count] = x[:, block.window_start : block.last]
        # else what they held before, were it infinite or NaN, would count though it weighs nothing
        self.v[:, self.count :] = 0
        if t.positions is not None:
            keys = self.k[:, : self.count]
            places = [(sink, sink + picked), (0, sink), (sink + picked, self.count)]
            keys.copy_(t.positions.keys_in_places(keys, places))
        self.selection, self.position, self.until = selection, block.last, until

    def attend(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logits: Tensor | None,
        problem: AttentionProblem,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The output is in the dtype that is multiplied in."""
        positions, query = problem.positions, q.to(self.k.dtype) * problem.scale
        if positions is not None:
            key = positions.rope.keys(key.to(self.k.dtype), self.count, positions.trained)
            query = positions.streaming(query, self.count + 1)
        if self.count == self.k.shape[1]:
            self._take_room(self.count + max(self.count // GROWTH, GROWTH))
        at = slice(self.count, self.count + 1)
        self.k[:, at], self.v[:, at] = key, value
        self.count, self.position = self.count + 1, self.position + 1
        # In bf16 all rows of the buffers, also those not in use: a part would be copied before it
        # is multiplied, and each new length would have a kernel made for it.
        rows = self.k.shape[1] if self.k.dtype == torch.bfloat16 else self.count
        k, v = self.k[:, :rows], self.v[:, :rows]
        logits = scratch.take("logits", (*q.shape[:2], rows), k)
        torch.bmm(query[:, :, 0], k.transpose(1, 2), out=logits)
        squash(logits, problem.softcap)
        if rows > self.count:
            logits[..., self.count :] = -torch.inf
        out = logits.new_empty(*logits.shape[:2], v.shape[-1])
        lse = weigh_values(logits, v, out, need_lse or sink_logits is not None)
        out, lse = out[:, :, None], None if lse is None else lse[..., None]
        if sink_logits is not None:
            assert lse is not None
            add_sink_logits(out, lse, sink_logits)
        return out, lse


def buffer_of(row: RowState) -> DecodeBuffer | None:
    """Return the buffer that a row's steps read, if it has one."""
    buffer = row.decode_buffer
    assert buffer is None or isinstance(buffer, DecodeBuffer)
    return buffer


def buffered_rows(
    problem: AttentionProblem, config: HiPConfig, state: DecodeState
) -> list[RowState] | None:
    """Return what is kept of each span's row for a decode step that selects nothing and whose keys
    are all in its buffer but its own, as in most steps. Return None for any other call."""
    if problem.q.shape[2] > 1 or not problem.spans or problem.sliding_window is not None:
        return None
    if problem.needs_grad or not state.bound(config, problem.k):
        return None
    rows = []
    for span in problem.spans:
        row = state.rows.get(span.batch)
        buffer = None if row is None else buffer_of(row)
        if row is None or buffer is None:
            return None
        if (row.key_start, row.position) != (span.key_start, span.position):
            return None
        if not buffer.serves(row.selection, span.position):
            return None
        rows.append(row)
    return rows


def new_keys(problem: AttentionProblem) -> Iterator[tuple[Tensor, Tensor]]:
    """The last key `[Hkv, 1, D]` and value `[Hkv, 1, Dv]` of every span."""
    for span in problem.spans:
        end = span.key_start + span.end
        key, value = (rows_of(x, span.batch, end - 1, end)[:, :] for x in (problem.k, problem.v))
        yield key, value


def attend_next(
    problem: AttentionProblem,
    rows: list[RowState],
    new: Iterable[tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor | None,
) -> Result:
    """A decode step of which all but its own keys and values, `new` (as `new_keys` gives them), is
    gathered in `rows`, one for each span: into out `[B, Hq, 1, Dv]` and lse `[B, Hq, 1]`."""
    heads = (problem.k.shape[1], problem.groups)
    q, outs = problem.q.unflatten(1, heads), out.unflatten(1, heads)
    sink_logits = None if problem.sinks is None else problem.sinks.unflatten(0, heads)
    read = visible = 0
    try:
        for span, row, (key, value) in zip(problem.spans, rows, new, strict=True):
            b, need_lse = span.batch, lse is not None
            buffer = buffer_of(row)
            assert buffer is not None
            outs[b], total = buffer.attend(q[b], key, value, sink_logits, problem, need_lse)
            if lse is not None:
                assert total is not None
                lse[b] = total.flatten(0, 1)
            row.position = span.end
            read, visible = read + buffer.count, visible + span.end
    except BaseException:  # also an interrupt, which may have updated only some rows
        for row in rows:
            row.decode_buffer = None
        raise
    return Result(out, lse, None, "sparse", "", partial(known, read, visible))
