"""The staged search where positions are given at attention time, against the same with loops; and
who places chunks at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_qkv, small
from staged_by_hand import Written
from tree_cases import layout, selected
from with_rope import DIM, EXTENDED, positions, rotated

from hip_hf import hip_attention
from hip_hf.rope import Positions

STAGES = [[[16, 64, 1], [8, 32, 1], [4, 16, 1]], [[16, 32, 1], [4, 16, 1]], [[4, 16, 1]]]


class StagedWithRope(Written):
    """`rows` are rotated already, as if every key were just outside the window, which begins with
    key `end`. `chunks`: how far a chunk may be before it; None: not chunk-indexed."""

    def __init__(
        self,
        keys: torch.Tensor,
        rows: torch.Tensor,
        score: str,
        end: int,
        where: Positions,
        chunks: int | None,
    ) -> None:
        super().__init__(keys, rows, score, DIM**-0.5)
        self.end, self.where, self.chunks = end, where, chunks

    def descend(self, chunks: list[int], size: int) -> torch.Tensor:
        keys, last = self.keys, self.end // size - 1
        if self.chunks is not None:
            back = [min(max(0, last - at // size), self.chunks) for at in range(len(keys))]
            self.keys = torch.stack(
                [rotated(key, -n, self.where.rope) for key, n in zip(keys, back, strict=True)]
            )
        try:
            return super().descend(chunks, size)
        finally:
            self.keys = keys


@pytest.mark.parametrize("chunk_indexed", [True, False])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(("rows", "trained"), [(35, 128), (3, 64), (35, 52)])
def test_every_stage_places_its_own_chunks(
    rows: int, trained: int, stages: list[list[int]], chunk_indexed: bool, poison: None
) -> None:
    """52 positions are too few for all chunks: the farther ones are equally far."""
    config = small(**EXTENDED, method="staged", options=dict(stages=stages), query_stride=1)
    where = positions(trained, chunk_indexed, dim=12, scaling=1.2)
    q, k, v = make_qkv(163, rows, dtype=torch.float64, heads=1)
    got, searched = selected(config, q, k, v, positions=where), 0
    farthest = max(0, trained - 1 - config.window - config.block_k - config.block_q)
    for n, (block, low, high) in enumerate(layout(config, rows, 163)):
        if high - low <= config.budget // config.block_k:
            continue
        end = high * config.block_k
        placed = [
            rotated(q[0, g, p - (163 - rows)], min(p - end + 1, trained - 1), where.rope)
            for g in range(2)
            for p in block
        ]
        votes = torch.stack(placed)
        votes[:, : where.rope.dim] *= where.rope.scaling**2
        search = StagedWithRope(
            k[0, 0], votes, config.score, end, where, farthest if chunk_indexed else None
        )
        assert got[0, n] == search.run(stages, low, high, config.block_k), f"query block {n}"
        searched += 1
    assert searched


@pytest.mark.parametrize("method", ["hip", "quest", "staged", "oracle", "streaming"])
def test_which_methods_place_chunks(method: str) -> None:
    """`oracle` looks at true scores of keys just outside the window, in all layers; `streaming` at
    nothing."""
    q, k, v = make_qkv(400, 40)
    config = small(**EXTENDED, method=method)
    outs: list[Any] = [
        hip_attention(q, k, v, config=config, positions=positions(128, indexed))
        for indexed in (True, False)
    ]
    assert torch.equal(*outs) == (method in ("oracle", "streaming"))
