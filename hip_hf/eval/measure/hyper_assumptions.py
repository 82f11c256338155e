"""Whether a layer meets the assumptions of HyperAttention: the two quantities that its guarantee
rests on.

The paper is arXiv 2310.05869, section 2.

Measured on the largest square of a text, the second half's queries against the first half's keys,
whose attention `P` is normalised over those keys. `column_norm`: the largest squared norm of a
column of `P`; 1/n if all keys count alike, up to the number of rows if all rows look at one key;
uniform sampling misses such keys. `row_ratio`: after the heavy entries (the own blocks) are
removed, the largest row sum of `exp(q . k)` over the smallest, as a power of ten; the sample
estimates that remainder. The guarantee holds where the first is near 1/n and the second near 0. The
first keys often take most attention, so the column norm is given without the sink as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.methods.base import options_of
from hip_hf.methods.hyper import Options, Square, hashes, projections, tile_square
from hip_hf.methods.ranking import squash
from hip_hf.problem import AttentionProblem

TITLE = (
    "Assumptions of hyper, worst head: largest column norm of normalised attention; "
    "row ratio without heavy entries (10^x)"
)
# Of each query head.
QUANTITIES = ("column_norm", "column_norm_past_sink", "row_ratio")


def measure_assumptions(problem: AttentionProblem, config: HiPConfig) -> dict[str, Any]:
    """The `QUANTITIES` for a problem of one span that begins at position 0, a list of numbers each,
    and how many `keys` the square has."""
    (span,) = problem.spans
    half, options, groups = span.end // 2, options_of(config, Options), problem.groups
    square = Square(half, span.end, 0, half)
    tiling = tile_square(square, options, problem.q.device)
    directions = projections(options, problem.q.shape[-1], config.seed, problem.q.device)
    rows = slice(span.row_start + half, span.row_end)
    keys = slice(span.key_start, span.key_start + half)
    results: dict[str, Any] = {name: [] for name in QUANTITIES}
    for head in range(problem.q.shape[1]):
        q = problem.q[span.batch, head, rows].float()
        k = problem.k[span.batch, head // groups, keys].float()
        by_q, by_k = (hashes(x, directions).argsort(stable=True) for x in (q, k))
        columns, light = torch.zeros(half, dtype=torch.float64, device=q.device), []
        for block, start in enumerate(tiling.starts.tolist()):
            some = by_q[block * tiling.rows : (block + 1) * tiling.rows]
            logits = (q[some] @ k.T) * problem.scale
            squash(logits, problem.softcap)
            columns += logits.softmax(-1).double().square().sum(0)
            logits[:, by_k[start : start + tiling.size]] = -torch.inf
            light.append(logits.logsumexp(-1))
        rest = torch.cat(light)
        past = columns[min(config.sink, half - 1) :]
        ratio = float(rest.max() - rest.min()) / math.log(10)
        found = float(columns.max()), float(past.max()), ratio
        for name, value in zip(QUANTITIES, found, strict=True):
            results[name].append(value)
    return results | {"keys": half}


def assumption_rows(layers: Mapping[int, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the report: each layer's worst head, mean over the texts."""
    rows = []
    for layer, parts in layers.items():
        row: dict[str, Any] = {"layer": layer}
        for name in QUANTITIES:
            row[name] = float(torch.tensor([part[name] for part in parts]).mean(0).max())
        rows.append(row | {"uniform": 1 / parts[0]["keys"]})
    return rows
