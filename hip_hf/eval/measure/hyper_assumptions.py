"""Whether a layer meets the assumptions of HyperAttention: the two quantities that its guarantee rests on.

The paper is arXiv 2310.05869, section 2.

Measured on the largest square of a text, the second half's queries against the first half's keys, whose attention `P` is
normalised over those keys. `column_norm`: the largest squared norm of a column of `P`; 1/n if all keys count alike, up to
the number of rows if all rows look at one key; uniform sampling misses such keys. `row_ratio`: after the heavy entries
(the own blocks) are removed, the largest row sum of `exp(q . k)` over the smallest, as a power of ten; the sample
estimates that remainder. The guarantee holds where the first is near 1/n and the second near 0. The first keys often
take most attention, so the column norm is given without the sink as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hip_hf.config import HiPConfig
from hip_hf.methods.hyper import Square, hashes, projections, tile
from hip_hf.problem import AttentionProblem

TITLE = "Assumptions of hyper, worst head: largest column norm of normalised attention; row ratio without heavy entries (10^x)"


@dataclass(frozen=True)
class HyperAssumptions:
    """Of one layer's query heads, each `[Hq]` (as lists where they come from a file)."""

    column_norm: torch.Tensor
    column_norm_past_sink: torch.Tensor
    row_ratio: torch.Tensor
    keys: int


def measure_assumptions(problem: AttentionProblem, config: HiPConfig) -> HyperAssumptions:
    """The two quantities for a problem of one span that begins at position 0."""
    (span,) = problem.spans
    middle, options, groups = span.end // 2, config.method_options(), problem.groups
    square = Square(middle, span.end, 0, middle)
    tiling = tile(square, options, problem.q.device)
    directions = projections(options, problem.q.shape[-1], config.seed, problem.q.device)
    rows, keys = slice(span.row_start + middle, span.row_end), slice(span.key_start, span.key_start + middle)
    results: list[tuple[float, float, float]] = []
    for head in range(problem.q.shape[1]):
        q, k = problem.q[span.batch, head, rows].float(), problem.k[span.batch, head // groups, keys].float()
        by_q, by_k = (hashes(x, directions).argsort(stable=True) for x in (q, k))
        columns, light = torch.zeros(middle, dtype=torch.float64, device=q.device), []
        for block, start in enumerate(tiling.starts.tolist()):
            some = by_q[block * tiling.rows : (block + 1) * tiling.rows]
            logits = (q[some] @ k.T) * problem.scale
            if problem.softcap is not None:
                logits = torch.tanh(logits / problem.softcap) * problem.softcap
            columns += logits.softmax(-1).double().square().sum(0)
            logits[:, by_k[start : start + tiling.size]] = -torch.inf
            light.append(logits.logsumexp(-1))
        rest = torch.cat(light)
        past = columns[min(config.sink, middle - 1) :]
        results.append((float(columns.max()), float(past.max()), float(rest.max() - rest.min()) / math.log(10)))
    norms, past_sink, ratios = (torch.tensor(values) for values in zip(*results, strict=True))
    return HyperAssumptions(norms, past_sink, ratios, middle)


def assumption_rows(layers: Mapping[int, Sequence[HyperAssumptions]]) -> list[dict[str, Any]]:
    """Rows of the report: each layer's worst head, mean over the texts."""
    rows = []
    for layer, parts in layers.items():
        row: dict[str, Any] = {"layer": layer}
        for name in ("column_norm", "column_norm_past_sink", "row_ratio"):
            texts = torch.stack([torch.as_tensor(getattr(part, name)) for part in parts])
            row[name] = float(texts.mean(0).max())
        rows.append(row | {"uniform": 1 / parts[0].keys})
    return rows
