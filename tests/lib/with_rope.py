"""Positions given at attention time, written down plainly: loops, complex numbers, float64."""

from __future__ import annotations

import cmath
from dataclasses import dataclass
from typing import Any

import brute
import torch
from helpers import make_qkv
from tree_cases import layout, selected

from hip_hf import HiPConfig
from hip_hf.rope import Positions, Rope

DIM = 16
EXTENDED = dict(extend="streaming", sink=4, window=16, budget=16)


def rope(dim: int = DIM, scaling: float = 1.0) -> Rope:
    return Rope(100.0 ** -torch.linspace(0, 1, dim // 2), scaling)


def positions(trained: int = 64, chunk_indexed: bool = False, **fields: Any) -> Positions:
    return Positions(rope(**fields), trained, chunk_indexed)


def rotated(x: torch.Tensor, position: int, by: Rope) -> torch.Tensor:
    """One vector `[D]` at a position, pair by pair."""
    out, half = x.clone(), len(by.inv_freq)
    for i in range(half):
        pair = complex(x[i], x[i + half]) * cmath.exp(1j * position * float(by.inv_freq[i]))
        out[i], out[i + half] = pair.real, pair.imag
    return out


def product(q: torch.Tensor, k: torch.Tensor, distance: int, by: Rope) -> float:
    """q . k at a distance, with the model's scaling of what turns on both sides."""
    both = rotated(q, distance, by)
    both[: by.dim] *= by.scaling**2
    return float(both @ k)


@dataclass
class SearchWithRope(brute.Search):
    """The plain search for keys that are not rotated. `rows` are rotated already, as if every key
    were just outside the window; `chunks` > 0: chunk-indexed, at most this many chunks away."""

    chunks: int | None = None
    by: Rope | None = None

    def back(self, level: int, index: int) -> int:
        return 0 if self.chunks is None else min(self.complete(level)[-1] - index, self.chunks)

    def unrotate(self, x: torch.Tensor, back: int) -> torch.Tensor:
        assert self.by is not None
        return rotated(x, -back, self.by)

    def box(self, level: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The box around the chunk's box when that is rotated: corner by corner of each pair."""
        assert self.by is not None
        inside = self.keys[index * self.size(level) : (index + 1) * self.size(level)]
        low, high, half = inside.amin(0), inside.amax(0), len(self.by.inv_freq)
        new_low, new_high = low.clone(), high.clone()
        for i in range(half):
            corners = []
            for a in (low[i], high[i]):
                for b in (low[i + half], high[i + half]):
                    pair = torch.zeros(len(low), dtype=torch.float64)
                    pair[i], pair[i + half] = a, b
                    corners.append(self.unrotate(pair, self.back(level, index)))
            for d in (i, i + half):
                new_low[d] = min(corner[d] for corner in corners)
                new_high[d] = max(corner[d] for corner in corners)
        return new_low, new_high

    def logit(self, row: torch.Tensor, level: int, index: int) -> float:
        inside = self.keys[index * self.size(level) : (index + 1) * self.size(level)]
        at = lambda key: float(row @ self.unrotate(key, self.back(level, index)))  # noqa: E731
        low, high = self.box(level, index)
        mean, bound = at(inside.mean(0)), float(torch.maximum(row * high, row * low).sum())
        name = self.config.representative
        if name == "middle":
            return self.capped(at(inside[len(inside) // 2]))
        weight = 1.0 if name == "minmax" else self.weight
        return self.capped((1 - weight) * mean + weight * bound)

    def judged(self, blocks: list[int]) -> dict[int, float]:
        keys, size = self.keys, self.config.block_k
        parts = [
            self.unrotate(key, self.back(0, j // size)) if j // size in blocks else key
            for j, key in enumerate(keys)
        ]
        self.keys = torch.stack(parts)
        try:
            return super().judged(blocks)
        finally:
            self.keys = keys


def near_at_streaming_places(
    config: HiPConfig,
    keys: torch.Tensor,
    rows: torch.Tensor,
    block: range,
    low: int,
    high: int,
    where: Positions,
) -> dict[tuple[int, int], float]:
    """Log-sum-exp of a query block's rows `[rows, heads, D]` over sink and window, in the places
    where attention will put them: with the keys that are yet to be selected in between."""
    sink, window = low * config.block_k, high * config.block_k
    skipped = window - sink - config.budget
    near = {}
    for i, at in enumerate(block):
        distance = {key: at - skipped - key for key in range(sink)} | {
            key: at - key for key in range(window, at + 1)
        }
        for head, row in enumerate(rows[i]):
            logits = [
                product(row, keys[key], min(d, where.trained - 1), where.rope)
                for key, d in distance.items()
            ]
            near[i, head] = brute.log_sum_exp([x * DIM**-0.5 for x in logits])
    return near


def check_selection(
    config: HiPConfig, tokens: int, rows: int, where: Positions, **shape: Any
) -> None:
    q, k, v = make_qkv(tokens, rows, dtype=torch.float64, heads=1, **shape)
    farthest = max(0, where.trained - 1 - config.window - config.block_k - config.block_q)
    got = selected(config, q, k, v, positions=where)
    searched = 0
    for n, (block, low, high) in enumerate(layout(config, rows, tokens)):
        if high - low <= config.budget // config.block_k:
            continue
        distance = lambda p: min(p - high * config.block_k + 1, where.trained - 1)  # noqa: B023, E731
        own = [
            [rotated(q[0, g, p - (tokens - rows)], distance(p), where.rope) for g in range(2)]
            for p in block
        ]
        placed = torch.stack([torch.stack(heads) for heads in own])
        placed[..., : where.rope.dim] *= where.rope.scaling**2
        chunks = farthest if where.chunk_indexed else None
        search = SearchWithRope(
            config, k[0, 0], [], low, high, DIM**-0.5, chunks=chunks, by=where.rope
        )
        if config.vote == "sampled":
            search.votes = brute.sampled(placed, config.query_stride)
        else:
            rows_of = q[
                0, :, block[0] - (tokens - rows) : block[-1] + 1 - (tokens - rows)
            ].transpose(0, 1)
            near = near_at_streaming_places(config, k[0, 0], rows_of, block, low, high, where)
            logit = lambda row, key, search=search: search.capped(float(row @ key))  # noqa: E731
            given = (near, low, high, logit, config.method_options().sample)
            search.votes, search.walking = brute.neediest(config, k[0, 0], placed, *given)
        assert got[0, n] == search.run(), f"query block {n}"
        searched += 1
    assert searched
