"""Rotary positions given at attention time: context extension (InfiniteHiP, arXiv 2502.08910;
StreamingLLM, arXiv 2309.17453).

q and k come un-rotated. Every distance at which a query meets a key can then be chosen, and none
exceeds what the model was trained for:

    a query block: what it reads (sink | selected | window) gets consecutive positions that end at
                   the query's
    dense rows:    true distances
    both:          `trained - 1` for every key that would be farther away
    selection:     a key counts as just outside the window (relative); in the first layers, chunks
                   count their distance from it in chunks (chunk-indexed)

Only differences of positions matter, so each rule picks its own origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hip_hf.config import HiPConfig
from hip_hf.geometry import QueryBlock, rows_of_blocks
from hip_hf.workers import scratch

# Layers before this one select with chunk-indexed positions (InfiniteHiP, appendix; its first three
# layers).
CHUNK_INDEXED_LAYERS = 3
# A table of angles starts with this many positions and doubles.
FEWEST_POSITIONS = 1024


class Rope:
    """The rotation of a model: pairs `(i, i + R / 2)` of the first `R` of the head's numbers are
    rotated by `position * inv_freq[i]`.

    `inv_freq` fp32 `[R / 2]`. `scaling`: what the model multiplies cosine and sine with (YaRN), for
    q and for k; q carries both.
    """

    def __init__(self, inv_freq: Tensor, scaling: float = 1.0) -> None:
        if not isinstance(inv_freq, Tensor) or inv_freq.ndim != 1 or not len(inv_freq):
            raise ValueError(f"inv_freq: got {inv_freq!r}, allowed: a tensor of one dimension")
        self.inv_freq = inv_freq.detach().to(device="cpu", dtype=torch.float32)
        self.scaling = float(scaling)
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[type[Rope], tuple[Tensor, float]]:
        """Copies and pickles make their tables anew."""
        return Rope, (self.inv_freq, self.scaling)

    @property
    def dim(self) -> int:
        """Numbers of a head that are rotated."""
        return 2 * len(self.inv_freq)

    def tables(self, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[>= count, R / 2]` of the positions from 0 on."""
        key = (dtype, device)
        known = self._tables.get(key)
        if known is None or len(known[0]) < count:
            most = max(FEWEST_POSITIONS, 1 << (count - 1).bit_length())
            # they outlive the mode they are made in
            with torch.inference_mode(False), torch.no_grad():
                known = self._cos_sin(0, most, dtype, device)
            self._tables[key] = known
        return known

    def _cos_sin(
        self, first: int, end: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[end - first, R / 2]` of the positions `first` to `end - 1`."""
        position = torch.arange(first, end, dtype=torch.float64, device="cpu")
        angles = position[:, None] * self.inv_freq.double()
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    def keys(
        self,
        x: Tensor,
        position: Tensor | int,
        most: int,
        back: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Keys `[..., n, D]` rotated to `position`: the first of consecutive ones, or int64
        `[..., n]`, all below `most`."""
        cos, sin = self.tables(most, x.dtype, x.device)
        index = slice(position, position + x.shape[-2]) if isinstance(position, int) else position
        return rotate(x, cos[index], sin[index], back, out)

    def queries(self, x: Tensor, position: Tensor | int, most: int) -> Tensor:
        """Queries `[..., n, D]` rotated to `position`, as `keys` does, and scaled for both sides of
        the product."""
        out = self.keys(x, position, most)
        if self.scaling != 1.0:
            out[..., : self.dim].mul_(self.scaling**2)
        return out

    def unrotate(self, x: Tensor, first: int) -> Tensor:
        """What the model rotated to the consecutive positions from `first` on, `[..., n, D]`,
        rotated back."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # no table: positions grow with the context
        cos, sin = self._cos_sin(first, first + x.shape[-2], dtype, x.device)
        out = rotate(x.to(dtype), cos, sin, back=True)
        if self.scaling != 1.0:
            out[..., : self.dim].div_(self.scaling)
        return out.to(x.dtype)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, back: bool = False, out: Tensor | None = None
) -> Tensor:
    """`[..., n, D]` rotated by angles `[..., n, R / 2]` (`back`: by minus these) into `out`, which
    is not x."""
    half, sign = cos.shape[-1], -1 if back else 1
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin, value=sign)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


@dataclass(frozen=True)
class Positions:
    """How the calls of one layer place queries and keys. `trained`: positions that the model was
    trained for."""

    rope: Rope
    trained: int
    chunk_indexed: bool = False

    def check(self, config: HiPConfig) -> None:
        """Raise ValueError if what a row reads under `config` does not fit in the trained length.
        Dense rows keep true distances and need no room."""
        if config.method == "dense":
            return
        selected = config.selected_keys
        reach = config.sink_end + selected + config.window
        if max(reach, config.block_q) > self.trained:
            names = "sink + budget + window" if selected else "sink + window"
            got = f"{reach} keys and block_q={config.block_q}"
            allowed = f"allowed with `extend`: up to the trained {self.trained}"
            raise ValueError(f"{names}: got {got}, {allowed}")

    def streaming(self, query: Tensor, keys: int) -> Tensor:
        """Queries `[..., rows, D]` of a query block in their places, the last of the `keys` that it
        reads. They stay unrotated where rounding to blocks makes these more than the trained
        length."""
        if keys > self.trained:
            return query
        return self.rope.queries(query, keys - query.shape[-2], self.trained)

    def streaming_logits(
        self, query: Tensor, k: Tensor, places: list[tuple[int, int]], total: int, out: Tensor
    ) -> None:
        """Logits of a query block, `[heads, G, rows, D]` from `streaming`, for some of the `total`
        keys that it reads, into `out` `[heads, G * rows, n]`. The keys `[heads, n, D]` stand in
        `places`, ranges of the order in which they are read."""
        rows, at = query.shape[2], 0
        if total <= self.trained:
            with_rope = self.keys_in_places(k, places)
            torch.bmm(query.flatten(1, 2), with_rope.transpose(1, 2), out=out)
            return
        first_row, last_row = total - rows, total - 1
        cuts = self.cuts(first_row, last_row)
        for first, end in places:
            bounds = sorted({first, *(cut for cut in cuts if first < cut < end), end})
            for low, high in pairwise(bounds):
                part = slice(at, at + high - low)
                self.dense_logits(query, k[:, part], first_row, last_row, low, out=out[..., part])
                at = part.stop

    def keys_in_places(self, k: Tensor, places: list[tuple[int, int]]) -> Tensor:
        """Keys `[heads, n, D]` rotated to where they stand, `places` as in `streaming_logits`, none
        beyond the trained length: a buffer that the next call reuses."""
        with_rope, at = scratch.take("with_rope", tuple(k.shape), k), 0
        for first, end in places:
            part = slice(at, at + end - first)
            self.rope.keys(k[:, part], first, self.trained, out=with_rope[:, part])
            at = part.stop
        return with_rope

    def cuts(self, first: int, last: int) -> list[int]:
        """Where a row block, at `first` to `last`, finds keys that are too far for all of its rows,
        and for some of them: those before the first cut, and those between it and the second. None
        is among the rows' own keys."""
        return [first - self.trained + 1, min(last - self.trained + 1, first)]

    def dense_logits(
        self, query: Tensor, k: Tensor, first: int, last: int, at: int, out: Tensor
    ) -> None:
        """Logits of rows at `first` to `last`, `[heads, G, rows, D]`, for the keys `[heads, n, D]`
        from position `at` on, which lie on one side of every cut, into `out`
        `[heads, G * rows, n]`. Keys too far away are all at `trained - 1`."""
        near, mixed = last - self.trained + 1, first - self.trained + 1
        if at >= mixed:
            into = scratch.take("with_rope", tuple(k.shape), k)
            keys = self.rope.keys(k, 0, last - at + 1, out=into)
            with_rope = self.rope.queries(query, first - at, last - at + 1)
            torch.bmm(with_rope.flatten(1, 2), keys.transpose(1, 2), out=out)
        if at >= near:
            return
        far = torch.full((query.shape[-2],), self.trained - 1, device=query.device)
        with_rope = self.rope.queries(query, far, self.trained).flatten(1, 2)
        if at < mixed:
            torch.bmm(with_rope, k.transpose(1, 2), out=out)
            return
        row = torch.arange(first, last + 1, device=k.device)[:, None]
        distance = row - torch.arange(at, at + k.shape[1], device=k.device)
        too_far = (distance >= self.trained).repeat(query.shape[1], 1)
        out.copy_(torch.where(too_far, torch.bmm(with_rope, k.transpose(1, 2)), out))

    def voting(self, q: Tensor, blocks: list[QueryBlock]) -> Tensor:
        """Queries `[..., rows, D]` as they select: so far from un-rotated keys as each is from the
        last key before its window."""
        distance = torch.zeros(q.shape[-2], dtype=torch.long, device="cpu")
        for block in blocks:
            at = torch.arange(block.first, block.last + 1, device="cpu")
            far = (at - block.window_start + 1).clamp(max=self.trained - 1)
            distance[rows_of_blocks([block])] = far
        return self.rope.queries(q, distance.to(q.device), self.trained)

    def chunk_angles(
        self, ids: Tensor, last: Tensor, farthest: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Chunk-indexed selection: cosine and sine `[..., P, M, R / 2]` by which chunks `ids`
        `[..., P, M]` are rotated back, a position for each chunk up to the last one before the
        window, `last` `[P]`; at most `farthest`."""
        cos, sin = self.rope.tables(self.trained, like.dtype, like.device)
        back = (last[:, None] - ids).clamp(min=0, max=farthest)
        return cos[back], sin[back]


def farthest_chunk(positions: Positions, config: HiPConfig) -> int:
    """Chunk-indexed selection: from this chunk on, counted back from the window, all are equally
    far."""
    return max(0, positions.trained - 1 - config.window - config.block_k - config.block_q)
