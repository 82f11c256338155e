"""What sparse attention leaves out, estimated: the keys between sink and window in clusters of like
keys, each by its mean and spread.

Every row weighs the clusters' means as if they were keys, with what is left of them once the key
blocks that the row reads are taken out, and merges the result with its sparse attention by their
log-sum-exps:

    logit[c] = q . mean[c] + q^2 . variance[c] / 2 + log(count[c])       value[c] = mean value

which is the sum of exp(q . k) over a cluster if its keys are spread normally. (Beyond sqrt(2
log(count)) standard deviations of q . k a cluster has no key, and the largest one is all of the
sum.) Clusters hold keys of like content from anywhere in the context: the means of neighbouring
keys say much less about them. There are `CLUSTERS` clusters at any length, so the estimate takes
O(1) for a row.

The first of these keys are the first centres. A key joins the nearest one; each time that as
many keys again have joined, the centres move to their clusters' means. So a key's cluster depends
on the keys before it alone, never changes, and is the same however a prompt is cut. On a GPU sums
are made by atomic additions, whose last bits vary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.cache.pages import KeyRows, pick
from hip_hf.geometry import BlockMask, QueryBlock
from hip_hf.methods.pyramid import MOST_SPARE
from hip_hf.methods.ranking import squash

if TYPE_CHECKING:
    from hip_hf.backends.tensors import Tensors

# Clusters of one key head. The demo's output error (streaming, budget 256: 0.259) falls to 0.122
# with 64 of them, to 0.117 with 128, and each of them costs a row as much as 1.5 keys.
CLUSTERS = 64
# Keys that join at once, and query blocks that are estimated at once: what they make stays in
# cache.
KEYS_AT_ONCE = 2048
BLOCKS_AT_ONCE = 4


class Clusters:
    """The clusters of one span's keys, from the key at `start` on, for all key heads.
    Append-only."""

    def __init__(self, start: int, k: KeyRows, v: KeyRows) -> None:
        heads, _, dim = k.shape
        self.start, self.device = start, k.device
        self.dtype = torch.promote_types(k.dtype, torch.float32)
        self.width = 2 * dim + v.shape[2] + 1  # a key's numbers: itself, its squares, its value, 1
        self.known = 0  # keys that have joined
        # whether several batch rows refer to it (beam search): copy before the next one joins
        self.shared = False
        self._ids = torch.empty(heads, 0, dtype=torch.uint8, device=k.device)
        self._centres = self._zeros(heads, dim)
        self._joined = self._zeros(heads, dim + 1)  # sums of keys that have joined, their number
        self._summed = 0  # keys in `_sums`
        self._sums = self._zeros(heads, self.width)

    def _zeros(self, heads: int, width: int) -> Tensor:
        return torch.zeros(heads, CLUSTERS, width, dtype=self.dtype, device=self.device)

    def writable(self) -> Clusters:
        """Itself, or a copy where others refer to it."""
        if not self.shared:
            return self
        other = object.__new__(Clusters)
        # what else there is, is replaced, not changed
        other.__dict__.update(self.__dict__, shared=False, _ids=self._ids.clone())
        return other

    def extend(self, k: KeyRows, end: int) -> None:
        """Let the keys up to position `end - 1` join; k `[Hkv, T, D]`. Fewer than there are
        clusters wait."""
        count = end - self.start
        if self.known == 0 and count >= CLUSTERS:
            self._centres = k[:, self.start : self.start + CLUSTERS].to(self.dtype)
        while self.known < count and (self.known or count >= CLUSTERS):
            # the centres are the same up to this key
            generation = CLUSTERS << (self.known // CLUSTERS).bit_length()
            last = min(count, generation, self.known + KEYS_AT_ONCE)
            self._join(k[:, self.start + self.known : self.start + last].to(self.dtype))
            if last == generation:
                sums, number = self._joined[..., :-1], self._joined[..., -1:]
                self._centres = torch.where(number > 0, sums / number.clamp(min=1), self._centres)

    def _join(self, keys: Tensor) -> None:
        squares, products = self._centres.square().sum(-1), 2 * keys @ self._centres.transpose(1, 2)
        ids = (squares[:, None] - products).argmin(-1)
        last = self.known + keys.shape[1]
        if last > self._ids.shape[1]:
            room = last + min(self.known, MOST_SPARE)
            with torch.inference_mode(False):  # it outlives the mode it was made in
                more = torch.empty(len(ids), room, dtype=torch.uint8, device=self.device)
            more[:, : self.known] = self._ids[:, : self.known]
            self._ids = more
        self._ids[:, self.known : last] = ids
        ones = keys.new_ones(*keys.shape[:2], 1)
        self._joined = self._joined + summed(ids, torch.cat([keys, ones], dim=-1), CLUSTERS)
        self.known = last

    def left(self, k: KeyRows, v: KeyRows, blocks: list[QueryBlock], chosen: Chosen) -> Tensor:
        """What query blocks, given in order of their positions, leave out: sums `[Hkv, S,
        len(blocks), CLUSTERS, width]` of the numbers of the keys between sink and window that are
        in none of the key blocks `chosen`."""
        heads, many = len(self._ids), len(blocks)
        windows = [block.window_start - self.start for block in blocks]
        if windows[0] < self._summed:  # where the window has gone back
            self._summed, self._sums = 0, torch.zeros_like(self._sums)
        first, last = self._summed, windows[-1]
        part = slice(self.start + first, self.start + last)
        rows = self._numbers(k[:, part], v[:, part])
        ids = self._ids[:, first:last].long()
        bounds = torch.tensor(windows[:-1], device=self.device)
        key = torch.arange(first, last, device=self.device)
        block = torch.bucketize(key, bounds, right=True)  # of which a key is new
        new = summed(block * CLUSTERS + ids, rows, many * CLUSTERS).view(heads, many, CLUSTERS, -1)
        sums = new.cumsum(1).add_(self._sums[:, None])
        self._summed, self._sums = last, sums[:, -1].clone()

        # take out what is read
        masks_per_kv_head, count = chosen.ids.shape[1], chosen.ids.shape[3]
        flat, size = chosen.ids.flatten(1), chosen.block_k  # [Hkv, S * blocks * n]
        rows = self._numbers(*(pick(x, flat, size) for x in (k, v)))
        at = (flat[..., None] * size + torch.arange(size, device=self.device)).flatten(1)
        ids = self._ids.gather(1, at - self.start).long()
        rows *= chosen.valid.expand_as(chosen.ids).flatten(1).repeat_interleave(size, 1)[..., None]
        block = torch.arange(masks_per_kv_head * many, device=self.device)
        block = block.repeat_interleave(count * size)
        read = summed(block * CLUSTERS + ids, rows, masks_per_kv_head * many * CLUSTERS)
        return sums[:, None] - read.view(heads, masks_per_kv_head, many, CLUSTERS, -1)

    def _numbers(self, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.to(self.dtype), v.to(self.dtype)
        return torch.cat([k, k.square(), v, k.new_ones(*k.shape[:2], 1)], dim=-1)


@dataclass(frozen=True)
class Chosen:
    """Key blocks that query blocks read between sink and window: ids int64 `[Hkv, S, blocks, n]`,
    of which `valid` count."""

    ids: Tensor
    valid: Tensor
    block_k: int

    @classmethod
    def of(cls, mask: BlockMask, batch: int, places: slice, heads: int, low: int) -> Chosen:
        """Those of the query blocks at `places` of a batch row; `low`: the first candidate."""
        tables = (x[batch].unflatten(0, (heads, -1)) for x in (mask.indices, mask.counts))
        indices, counts = (x[:, :, places].long() for x in tables)
        valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        return cls(torch.where(valid, indices, low), valid, mask.block_k)


def summed(ids: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sums `[heads, count, width]` of the rows `[heads, n, width]` that have the same id; ids
    `[heads, n]`, or `[n]`."""
    ids = ids.expand(rows.shape[:2])
    out = rows.new_zeros(len(rows), count, rows.shape[-1])
    return out.scatter_add_(1, ids[..., None].expand_as(rows), rows)


def estimate(t: Tensors, block: QueryBlock, count: int, left: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of `count` neighbouring query blocks as long as `block`, their first, to what they
    leave out, `Clusters.left`: output `[Hkv, G, count * rows, Dv]` and log-sum-exp
    `[Hkv, G, count * rows]`, -inf where nothing is left out."""
    q = t.q[:, :, block.row : block.row + count * block.rows].unflatten(2, (count, -1))
    q = q.to(left.dtype) * t.scale
    dim, number = q.shape[-1], left[..., -1]
    mean = left[..., :-1] / number.clamp(min=1)[..., None]
    key, square, value = mean.tensor_split((dim, 2 * dim), dim=-1)
    variance = (square - key.square()).clamp_(min=0)
    spread = (q.square() @ variance.transpose(-1, -2)).sqrt_()
    often = number.clamp(min=1).log()[..., None, :]
    farthest = (2 * often).sqrt()
    bonus = torch.where(spread < farthest, spread.square() / 2, spread * farthest - often)
    logits = q @ key.transpose(-1, -2) + bonus
    squash(logits, t.softcap)
    logits += number.log()[..., None, :]
    lse = logits.logsumexp(-1)
    weight = torch.exp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    return (weight @ value).flatten(2, 3), lse.flatten(2, 3)


def alike(blocks: list[QueryBlock]) -> Iterator[tuple[bool, list[QueryBlock]]]:
    """Runs of query blocks that are equally long, a few at a time, and whether they have keys
    enough between sink and window for clusters."""
    kind = lambda block: (block.rows, block.window_start - block.sink_end >= CLUSTERS)  # noqa: E731
    for (_, enough), run in groupby(blocks, key=kind):
        same = list(run)
        for at in range(0, len(same), BLOCKS_AT_ONCE):
            yield enough, same[at : at + BLOCKS_AT_ONCE]
