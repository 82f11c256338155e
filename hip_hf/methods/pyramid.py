"""The pyramid of chunk summaries that the tree search walks (HiP section 3; representatives:
InfiniteHiP's and this project's).

Level `l` summarises each aligned chunk of `block_k * 2**l` keys by a few vectors. Chunks are
complete when they are summarised, so a summary never changes: the pyramid is append-only. A parent
is merged from its two children, so one pass over the keys builds all levels, and appending needs
only the last chunk of each level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hip_hf.cache.pages import KeyRows
from hip_hf.rope import rotate

# Summaries are computed for this many blocks at a time, so that temporaries stay in cache.
BLOCKS_AT_ONCE = 2048
# Rows that a full table is given at most beyond what is asked for: what waits to be used does not
# grow with the context.
MOST_SPARE = 1024


class Representative:
    """How a chunk is summarised and how a query is scored against a summary.

    A *state* `[..., S, D]` is what merging needs; a *row* `[..., width]` is what scoring reads.
    Both are computed in fp32 (fp64 for fp64 keys).
    """

    def leaf(self, keys: Tensor) -> Tensor:
        """State of blocks: keys `[..., block_k, D]` -> `[..., S, D]`."""
        raise NotImplementedError

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        """State of a chunk from the states of its halves."""
        raise NotImplementedError

    def row(self, state: Tensor) -> Tensor:
        """What scoring reads: `[..., S, D]` -> `[..., F]`."""
        return state.flatten(-2)

    def features(self, q: Tensor) -> Tensor:
        """What a query multiplies a row with: `[..., D]` -> `[..., F]`."""
        return q

    def unrotate(self, rows: Tensor, cos: Tensor, sin: Tensor, dim: int, out: Tensor) -> Tensor:
        """Rows `[..., width]`, of keys with `dim` numbers, rotated back by angles `[..., R / 2]`,
        into `out`."""
        vectors, into = rows.unflatten(-1, (-1, dim)), out.unflatten(-1, (-1, dim))
        rotate(vectors, cos[..., None, :], sin[..., None, :], back=True, out=into)
        return out


class MiddleKey(Representative):
    """The middle key alone (the paper)."""

    def leaf(self, keys: Tensor) -> Tensor:
        # the first key goes along: that of a right half is the middle key of the whole
        index = [0, keys.shape[-2] // 2]
        return keys[..., index, :]

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([left[..., 0, :], right[..., 0, :]], dim=-2)

    def row(self, state: Tensor) -> Tensor:
        return state[..., 1, :]


class CentreSpread(Representative):
    """`(1 - w) * mean + w * bound`, where the bound is the largest `q . k` that the chunk's box of
    keys allows.

    With `c = (1 - w) mean + w (max + min) / 2` and `s = w (max - min) / 2` that is `[q, |q|] . [c,
    s]`.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def leaf(self, keys: Tensor) -> Tensor:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        mean = keys.sum(-2, dtype=dtype) / keys.shape[-2]
        on_cpu = keys.device.type == "cpu"
        low, high = (keys.amin(-2), keys.amax(-2)) if on_cpu else keys.aminmax(dim=-2)
        return torch.stack([mean, low.to(dtype), high.to(dtype)], dim=-2)

    def merge(self, left: Tensor, right: Tensor) -> Tensor:
        (mean, low, high), (mean_b, low_b, high_b) = left.unbind(-2), right.unbind(-2)
        parts = ((mean + mean_b) / 2, torch.minimum(low, low_b), torch.maximum(high, high_b))
        return torch.stack(parts, dim=-2)

    def row(self, state: Tensor) -> Tensor:
        mean, low, high = state.unbind(-2)
        centre = (1 - self.weight) * mean + self.weight / 2 * (high + low)
        return torch.cat([centre, self.weight / 2 * (high - low)], dim=-1)

    def features(self, q: Tensor) -> Tensor:
        return torch.cat([q, q.abs()], dim=-1)

    def unrotate(self, rows: Tensor, cos: Tensor, sin: Tensor, dim: int, out: Tensor) -> Tensor:
        # the box around a rotated box: its half width in a direction is what both of its sides
        # reach there
        rotate(rows[..., :dim], cos, sin, back=True, out=out[..., :dim])
        half, cos, sin = cos.shape[-1], cos.abs(), sin.abs()
        spread, into = rows[..., dim:], out[..., dim:]
        a, b = spread[..., :half], spread[..., half : 2 * half]
        torch.mul(a, cos, out=into[..., :half]).addcmul_(b, sin)
        torch.mul(b, cos, out=into[..., half : 2 * half]).addcmul_(a, sin)
        into[..., 2 * half :] = spread[..., 2 * half :]
        return out


def make_representative(name: str, weight: float) -> Representative:
    """The representative of that name (`HiPConfig.representative`)."""
    if name == "middle":
        return MiddleKey()
    return CentreSpread(1.0 if name == "minmax" else weight)


class Pyramid:
    """Summaries of the first `blocks` key blocks of one span, for all its key heads.

    `levels[l]` is `[Hkv, capacity, width]`, of which the first `blocks >> l` rows are written.
    `dtype` is that of the rows: the dtype in which the backend multiplies.
    """

    def __init__(self, representative: Representative, block_k: int, dtype: torch.dtype) -> None:
        self.representative = representative
        self.block_k = block_k
        self.dtype = dtype
        self.blocks = 0
        self.levels: list[Tensor] = []
        # whether several batch rows refer to it (beam search): copy before the next append
        self.shared = False
        self._last: list[Tensor | None] = []  # state of the last chunk of each level

    def count(self, level: int) -> int:
        """Complete chunks at `level`."""
        return self.blocks >> level

    @property
    def nbytes(self) -> int:
        """Memory of the summaries."""
        return sum(table.nbytes for table in self.levels)

    def copy(self) -> Pyramid:
        """Return a copy that can be extended by itself."""
        other = Pyramid(self.representative, self.block_k, self.dtype)
        other.blocks = self.blocks
        other.levels = [table.clone() for table in self.levels]
        other._last = list(self._last)
        return other

    def writable(self, blocks: int) -> Pyramid:
        """Itself, or a copy where others refer to it and blocks will be appended to reach
        `blocks`."""
        return self.copy() if self.shared and blocks > self.blocks else self

    def truncate(self, blocks: int) -> None:
        """Forget all but the first `blocks` blocks."""
        if blocks >= self.blocks:
            return
        for level in range(len(self.levels)):
            if blocks >> level != self.blocks >> level:
                self._last[level] = None  # recomputed when a sibling comes
        self.blocks = blocks

    def _blocks_of(self, keys: KeyRows, first: int, last: int) -> Tensor:
        part = keys[:, first * self.block_k : last * self.block_k]
        return part.unflatten(1, (last - first, self.block_k))

    def _chunk_state(self, keys: KeyRows, level: int, index: int) -> Tensor:
        blocks = self._blocks_of(keys, index << level, (index + 1) << level)
        state = self.representative.leaf(blocks)
        for _ in range(level):
            state = self.representative.merge(state[:, 0::2], state[:, 1::2])
        return state

    def _write(self, level: int, first: int, states: Tensor) -> None:
        rows = self.representative.row(states)
        heads, count, width = rows.shape
        if level == len(self.levels):
            self.levels.append(rows.new_empty(heads, 0, width, dtype=self.dtype))
            self._last.append(None)
        if first + count > self.levels[level].shape[1]:
            # exact at first, when the prompt is read; then with room to spare, so that a token
            # seldom copies a table
            old = self.levels[level]
            capacity = first + count + min(first, MOST_SPARE)
            with torch.inference_mode(False):  # a table outlives the mode it was made in
                self.levels[level] = rows.new_empty(heads, capacity, width, dtype=self.dtype)
            self.levels[level][:, :first] = old[:, :first]
        self.levels[level][:, first : first + count] = rows

    def extend(self, keys: KeyRows, blocks: int) -> None:
        """Append until `blocks` blocks are summarised. `keys` is the span's `[Hkv, T, D]`, all of
        it."""
        while self.blocks < blocks:
            self._append(keys, min(blocks, self.blocks + BLOCKS_AT_ONCE))

    def _append(self, keys: KeyRows, blocks: int) -> None:
        states = self.representative.leaf(self._blocks_of(keys, self.blocks, blocks))
        first, level = self.blocks, 0
        while states.shape[1]:
            self._write(level, first, states)
            pending = self._last[level]
            self._last[level] = states[:, -1:].clone()
            if first % 2:
                if pending is None:
                    pending = self._chunk_state(keys, level, first - 1)
                states = torch.cat([pending, states], dim=1)
            even = states[:, : states.shape[1] // 2 * 2]
            states = self.representative.merge(even[:, 0::2], even[:, 1::2])
            first, level = first // 2, level + 1
        self.blocks = blocks
