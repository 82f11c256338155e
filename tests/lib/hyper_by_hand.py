"""What HyperAttention weighs, written down again from its description."""

from __future__ import annotations

import functools

import torch

from hip_hf.config import HiPConfig
from hip_hf.methods import hyper
from hip_hf.methods.hyper import Square

OPTIONS = dict(min_seq_len=24, block_size=8, sample_size=6)


def pairs(first: int, end: int, least: int) -> list[tuple[range, range, bool]]:
    """Rows, keys, and whether they are exact: causal attention of the rows `first` to `end - 1`,
    taken apart."""
    if end <= least:
        return [(range(first, end), range(end), True)]

    def halve(low: int, high: int) -> list[tuple[range, range, bool]]:
        if high - low <= least:
            return [(range(low, high), range(low, high), True)]
        middle = (low + high) // 2
        return [
            *halve(low, middle),
            *halve(middle, high),
            (range(middle, high), range(low, middle), False),
        ]

    square = [(range(first, end), range(first), False)] if first else []
    return square + halve(first, end)


@functools.cache
def gray_code(bits: int) -> dict[int, int]:
    """Place of every code word in the Gray code sequence."""
    return {n ^ (n >> 1): n for n in range(1 << bits)}


def gray_rank(vectors: torch.Tensor, directions: torch.Tensor) -> list[int]:
    """The places of vectors `[n, D]`, by their signs."""
    signs = (vectors.float() @ directions > 0).tolist()
    return [
        gray_code(directions.shape[1])[sum(1 << i for i, up in enumerate(word) if up)]
        for word in signs
    ]


def weights(q: torch.Tensor, k: torch.Tensor, config: HiPConfig) -> torch.Tensor:
    """How often each key counts for each row, `[Hq, Tq, Tk]`, of one batch row."""
    options, rows, keys = config.method_options(), q.shape[2], k.shape[2]
    groups, position = q.shape[1] // k.shape[1], keys - rows
    directions = hyper.projections(options, q.shape[3], config.seed, q.device)
    out = torch.zeros(q.shape[1], rows, keys, dtype=torch.float64)
    for some, others, exact in pairs(position, keys, options.min_seq_len):
        if exact:
            for i in some:
                out[:, i - position, others.start : i + 1] += 1
            continue
        square = Square(some.start, some.stop, others.start, others.stop)
        tiling = hyper.tile_square(square, options, q.device)
        ranks = hyper.sampled_ranks(square, tiling.samples, config.seed, q.device)
        for head in range(q.shape[1]):
            of_q, of_k = (
                gray_rank(q[0, head], directions),
                gray_rank(k[0, head // groups], directions),
            )
            by_q = [i for _, i in sorted((of_q[i - position], i) for i in some)]
            by_k = [j for _, j in sorted((of_k[j], j) for j in others)]
            for rank, i in enumerate(by_q):
                start = int(tiling.starts[rank // tiling.rows])
                own = by_k[start : start + tiling.size]
                sampled = [by_k[r] for r in ranks.tolist()]
                out[head, i - position, own] += 1
                for j in sampled:
                    if j not in own:
                        out[head, i - position, j] += len(others) / len(sampled)
    return out
