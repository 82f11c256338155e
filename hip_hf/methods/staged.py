"""InfiniteHiP's staged search (arXiv 2502.08910): a few stages, each of which keeps the best chunks
and splits them.

A stage `(chunk, keep, query_stride)` looks for a representative key inside every candidate chunk by
binary descent (compare the middle keys of the two halves, step into the better half, down to one
key; the best logits seen count), keeps the best `keep` keys' worth of chunks, and the next stage
cuts those into its smaller chunks:

    stage 1   [ . .|*. ] [ .*| . ] [ . .| .*]      all chunks, descents in parallel
    stage 2   [.*][. .]            [*.][. .]  []   the kept ones, cut; the rest at the edges
    stage 3   []  []               []  []          the best `budget / block_k` key blocks: attended

With `halvings=0`, a chunk's middle key is its representative; stages that each halve the chunks are
then the plain tree search. Nothing is summarised, so there is no pyramid; the first stage costs O(T
/ chunk) per query block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hip_hf.config import HiPConfig, refuse
from hip_hf.geometry import QueryBlock
from hip_hf.methods import base
from hip_hf.methods.ranking import NO_CHUNK, aggregate, best, sampled_rows
from hip_hf.rope import farthest_chunk, rotate
from hip_hf.workers import compute_dtype, scratch

if TYPE_CHECKING:
    from hip_hf.rope import Positions


@dataclass(frozen=True)
class Stage:
    """Chunks of `chunk` keys, of which the best `keep` keys' worth stay, as every `query_stride`-th
    row votes."""

    chunk: int
    keep: int
    query_stride: int


@dataclass(frozen=True)
class Options:
    """`stages`: `[[chunk, keep, query_stride], ...]`, None: `[[16 block_k, 16 budget], [4 block_k,
    4 budget], [block_k, budget]]` with the settings' `query_stride`. `halvings`: steps of the
    descent; None: down to one key."""

    stages: list[list[int]] | None = None
    halvings: int | None = None

    def __post_init__(self) -> None:
        if self.halvings is not None and (type(self.halvings) is not int or self.halvings < 0):
            refuse("options['halvings']", self.halvings, "None or an integer >= 0")
        stages = [] if self.stages is None else self.stages
        rows = isinstance(stages, (list, tuple)) and (len(stages) > 0 or self.stages is None)
        if not rows or not all(_is_stage(stage) for stage in stages):
            allowed = "None or a list of [chunk, keep, query_stride], integers >= 1"
            refuse("options['stages']", stages, allowed)

    def check(self, config: HiPConfig) -> None:
        """Raise ValueError for stages that do not fit the settings."""
        stages, size = stages_of(config, self), config.block_k
        refuse_stages = partial(refuse, "options['stages']", self.stages)
        for before, stage in zip([None, *stages], stages, strict=False):
            blocks = stage.chunk // size
            halved = stage.chunk % size == 0 and blocks & (blocks - 1) == 0
            if not halved or (before and stage.chunk >= before.chunk):
                refuse_stages(f"chunks of block_k={size} times powers of two, in descending order")
            if stage.keep % stage.chunk or (before and stage.keep > before.keep):
                refuse_stages("keep: multiples of the stage's chunk, in descending order")
        if (stages[-1].chunk, stages[-1].keep) != (size, config.budget):
            refuse_stages(f"at last [block_k={size}, budget={config.budget}, ...]")
        refresh = config.decode_refresh
        if isinstance(refresh, list) and len(refresh) != len(stages):
            refuse("decode_refresh", refresh, f"an integer or {len(stages)}, one per stage")


def _is_stage(value: object) -> bool:
    """Whether it is `[chunk, keep, query_stride]`."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    return all(type(n) is int and n > 0 for n in value)


def stages_of(config: HiPConfig, options: Options) -> list[Stage]:
    """The stages that hold, defaults filled in."""
    if options.stages is not None:
        return [Stage(*stage) for stage in options.stages]
    return [Stage(n * config.block_k, n * config.budget, config.query_stride) for n in (16, 4, 1)]


def first_stage(stages: Sequence[Stage], block_k: int, low: int, high: int) -> int:
    """The first stage that has something to leave out between the blocks `low` and `high - 1`."""
    for i, stage in enumerate(stages[:-1]):
        blocks = stage.chunk // block_k
        if high // blocks - -(-low // blocks) > stage.keep // stage.chunk:
            return i
    return len(stages) - 1


def candidates(stages: Sequence[Stage], block_k: int, low: int, high: int) -> list[int]:
    """How many chunks each stage scores, for the cost; 0 for a stage that is left out."""
    counts, first = [], first_stage(stages, block_k, low, high)
    for i, stage in enumerate(stages):
        blocks = stage.chunk // block_k
        if i < first:
            counts.append(0)
        elif i == first:
            counts.append(high // blocks - -(-low // blocks))
        else:
            ratio = stages[i - 1].chunk // stage.chunk
            counts.append(stages[i - 1].keep // stage.chunk + 2 * (ratio - 1))
    return counts


def descent(stage: Stage, halvings: int | None) -> int:
    """Steps of the stage's descent: down to one key, or as long as there are halves."""
    most = (stage.chunk & -stage.chunk).bit_length() - 1
    return most if halvings is None else min(halvings, most)


class Selector(base.Selector):
    """The stages with the settings bound."""

    extends = True

    def __init__(self, config: HiPConfig) -> None:
        super().__init__(config)
        self.options = base.options_of(config, Options)
        self.stages = stages_of(config, self.options)

    def cost(self, block: QueryBlock, dim: int) -> tuple[int, int]:
        products = loads = 0
        counts = candidates(self.stages, self.config.block_k, block.low, block.high)
        for stage, count in zip(self.stages, counts, strict=True):
            keys = count * max(2 * descent(stage, self.options.halvings), 1)
            products += len(sampled_rows(block, stage.query_stride)) * keys
            loads += keys
        return products * 2 * dim, loads * dim

    def bind(
        self, q: Tensor, keys: Tensor, pyramid: object, scale: float, softcap: float | None
    ) -> StagedSearch:
        halvings = self.options.halvings
        return StagedSearch(self.config, self.stages, halvings, q, keys, scale, softcap)


@dataclass(frozen=True)
class StagedSearch(base.BoundSelector):
    """The stages bound to a span."""

    config: HiPConfig
    stages: list[Stage]
    halvings: int | None
    q: Tensor
    keys: Tensor
    scale: float
    softcap: float | None
    positions: Positions | None = None  # chunk-indexed, where the context is extended

    def chunk_indexed(self, positions: Positions) -> StagedSearch:
        """The search in which a chunk that is `n` chunks of its stage before the window counts as
        `n` keys farther away, all of its keys alike."""
        return replace(self, positions=positions)

    def select(self, heads: slice, blocks: list[QueryBlock]) -> Tensor:
        """Sorted block indices `[heads, S, len(blocks), budget / block_k]`."""
        size, parts = self.config.block_k, []

        def alike(block: QueryBlock) -> tuple[int, int]:
            return block.rows, first_stage(self.stages, size, block.low, block.high)

        for _, run in groupby(blocks, key=alike):
            parts += self.resume(heads, list(run), [])[-1:]
        # the last stage is never left out
        return torch.cat([ids for ids in parts if ids is not None], dim=2)

    def resume(
        self, heads: slice, blocks: list[QueryBlock], kept: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """What every stage keeps, chunk indices `[heads, S, len(blocks), keep / chunk]` (None: left
        out), given what the first `len(kept)` of them have kept before. The blocks have as many
        rows and begin with the same stage."""
        device, block_k = self.q.device, self.config.block_k
        masks_per_kv_head = 1 if self.config.group_shared else self.q.shape[1]
        low = torch.tensor([b.low for b in blocks], device=device).repeat(masks_per_kv_head)  # [P]
        high = torch.tensor([b.high for b in blocks], device=device).repeat(masks_per_kv_head)
        begin = first_stage(self.stages, block_k, blocks[0].low, blocks[0].high)
        results = list(kept)
        for i in range(len(kept), len(self.stages)):
            stage = self.stages[i]
            size = stage.chunk // block_k
            first, end = -(-low // size), high // size  # complete chunks
            if i < begin:
                results.append(None)
                continue
            if i == begin:
                most = int((end - first).max())
                ids = first[:, None] + torch.arange(most, device=device)
                ids = ids.expand(heads.stop - heads.start, -1, -1)
                missing = ids >= end[:, None]
            else:
                before, last = self.stages[i - 1].chunk // block_k, results[-1]
                assert last is not None
                was = (-(-low // before), high // before)
                ids, missing = _cut(last.flatten(1, 2), before // size, (first, end), was)
            scores = self._score(heads, blocks, stage, ids, missing, end)
            ids = ids.masked_fill(missing, NO_CHUNK)
            ids = best(scores, ids, stage.keep // stage.chunk).sort(dim=-1).values
            results.append(ids.unflatten(1, (masks_per_kv_head, len(blocks))))
        return results

    def _rows(self, heads: slice, blocks: list[QueryBlock], stride: int) -> Tensor:
        """Voting queries `[heads, S * len(blocks), R, D]`, scaled."""
        index = [list(sampled_rows(block, stride)) for block in blocks]
        q = self.q[heads][:, :, torch.tensor(index, device=self.q.device)]
        q = q.to(compute_dtype(q)) * self.scale
        shared = self.config.group_shared
        return (q.transpose(1, 2).flatten(2, 3) if shared else q.flatten(1, 2)).contiguous()

    def _score(
        self,
        heads: slice,
        blocks: list[QueryBlock],
        stage: Stage,
        ids: Tensor,
        missing: Tensor,
        end: Tensor,
    ) -> Tensor:
        """Scores `[heads, P, M]` of chunks by the best key that the descent meets; `end` `[P]`: the
        chunk after the last one."""
        q, size = self._rows(heads, blocks, stage.query_stride), stage.chunk
        angles = None
        if self.positions is not None:
            farthest = farthest_chunk(self.positions, self.config)
            angles = self.positions.chunk_angles(ids, end - 1, farthest, q)
        at = ids.masked_fill(missing, 0) * size
        seen = None
        for _ in range(descent(stage, self.halvings)):
            size //= 2
            both = torch.stack([at, at + size], dim=-1)
            logits = self._logits(heads, q, (both + size // 2).flatten(-2), angles)
            nowhere = missing.repeat_interleave(2, -1)
            scores = aggregate(logits.clone(), self.config.score, self.softcap, nowhere)
            left, right = scores.unflatten(-1, (-1, 2)).unbind(-1)
            at = torch.where(right > left, both[..., 1], both[..., 0])
            better = logits.unflatten(-1, (-1, 2)).amax(-1)
            seen = better if seen is None else torch.maximum(seen, better)
        if seen is None:
            seen = self._logits(heads, q, at + size // 2, angles)
        return aggregate(seen, self.config.score, self.softcap, missing)

    def _logits(
        self, heads: slice, q: Tensor, position: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Logits `[heads, P, R, n]` of the voting rows for the keys at `position` `[heads, P, n]`,
        one or two of each chunk; `angles` `[heads, P, M, R / 2]`: by which each chunk's keys are
        rotated back."""
        keys = self.keys[heads]
        picked = scratch.take("picked", (*position.shape, keys.shape[-1]), keys)
        for head in range(len(keys)):
            into = picked[head].flatten(0, 1)
            torch.index_select(keys[head], 0, position[head].flatten(), out=into)
        picked = picked.to(q.dtype)
        if angles is not None:
            cos, sin = (x.repeat_interleave(position.shape[2] // x.shape[2], 2) for x in angles)
            unrotated = scratch.take("unrotated", picked.shape, picked)
            picked = rotate(picked, cos, sin, back=True, out=unrotated)
        return q @ picked.transpose(2, 3)


def _cut(
    kept: Tensor, ratio: int, ends: tuple[Tensor, Tensor], was: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The parts of the kept chunks, `ratio` of each, and the chunks at the edges that no larger one
    covered; and which do not exist. The first chunk and the end of what is searched: now (`ends`),
    and in the larger chunks (`was`)."""
    parts = (kept[..., None] * ratio + torch.arange(ratio, device=kept.device)).flatten(-2)
    edge = torch.arange(ratio - 1, device=kept.device)
    begin, covered = (x[:, None] * ratio for x in was)
    left, right = ends[0][:, None] + edge, covered + edge
    edges = torch.cat([left, right], dim=-1)
    outside = torch.cat([left >= begin, right >= ends[1][:, None]], dim=-1)
    shape = (*parts.shape[:2], -1)
    ids = torch.cat([parts, edges.expand(shape)], dim=-1)
    absent = torch.zeros_like(parts, dtype=torch.bool)
    return ids, torch.cat([absent, outside.expand(shape)], dim=-1)


METHOD = base.Method(
    "InfiniteHiP: stages of chunks, in-chunk descent, each stage with its own refresh interval",
    Selector,
    Options,
)
