"""The staged search, written down with loops."""

from __future__ import annotations

import torch


class Written:
    """The staged search of one query block, with loops."""

    def __init__(self, keys: torch.Tensor, rows: torch.Tensor, score: str, scale: float) -> None:
        self.keys, self.rows, self.score, self.scale = keys, rows, score, scale

    def aggregate(self, logits: torch.Tensor) -> torch.Tensor:
        """`[rows, candidates]` -> one score per candidate."""
        return logits.amax(0) if self.score == "max" else logits.softmax(1).sum(0)

    def descend(self, chunks: list[int], size: int) -> torch.Tensor:
        """Best logits `[rows, chunks]` met on the way down from each chunk."""
        at, seen = [c * size for c in chunks], None
        while size > 1:
            size //= 2
            halves = [a + half for a in at for half in (0, size)]
            logits = self.rows @ self.keys[[h + size // 2 for h in halves]].T * self.scale
            scores = self.aggregate(logits)
            at = [
                halves[2 * i + (1 if scores[2 * i + 1] > scores[2 * i] else 0)]
                for i in range(len(at))
            ]
            best = torch.maximum(logits[:, 0::2], logits[:, 1::2])
            seen = best if seen is None else torch.maximum(seen, best)
        return self.rows @ self.keys[at].T * self.scale if seen is None else seen

    def run(self, stages: list[list[int]], low: int, high: int, block_k: int) -> list[int]:
        """Blocks kept of the candidates `[low, high)`."""
        kept: list[int] | None = None
        size = 0
        for i, (chunk, keep, _) in enumerate(stages):
            whole = [
                c
                for c in range(high * block_k // chunk + 1)
                if c * chunk >= low * block_k and (c + 1) * chunk <= high * block_k
            ]
            if kept is None and len(whole) <= keep // chunk and i < len(stages) - 1:
                continue
            if kept is not None:
                old = {k * size // chunk + j for k in kept for j in range(size // chunk)}
                inside = [
                    c
                    for c in range(high * block_k // size + 1)
                    if c * size >= low * block_k and (c + 1) * size <= high * block_k
                ]
                covered = {c * size // chunk + j for c in inside for j in range(size // chunk)}
                whole = [c for c in whole if c in old or c not in covered]
            scores = self.aggregate(self.descend(whole, chunk))
            order = sorted(range(len(whole)), key=lambda n: (-float(scores[n]), whole[n]))
            kept, size = sorted(whole[n] for n in order[: keep // chunk]), chunk
        assert kept is not None
        return kept
