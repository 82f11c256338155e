"""How well a checkpoint predicts a text, by position, with each of several settings.

A text is read a chunk at a time into a `HiPCache`, as chunked prefill reads a prompt, so memory is
that of the cache and of one chunk and the length is limited by patience alone. Every token but the
first of a text is predicted once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist, fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.passkey import density, path_of, use
from hip_hf.eval.reporting.resumable import Resumable, Rows
from hip_hf.integration.explain import explain
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.versions import CACHE

# Tokens whose losses are kept as one sum: positions are counted, and intervals computed, in such
# blocks.
BLOCK = 128
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PerplexityPlan:
    """What to read: `texts` windows of `tokens` tokens, evenly spread over the document, `chunk`
    tokens at a time. Raises ValueError if `tokens` or `chunk` is no multiple of `BLOCK`."""

    configs: dict[str, HiPConfig]
    tokens: int
    texts: int = 2
    chunk: int = 2048

    def __post_init__(self) -> None:
        for name in ("tokens", "chunk"):
            if (value := getattr(self, name)) < BLOCK or value % BLOCK:
                raise ValueError(f"--{name}: got {value}, allowed: a multiple of {BLOCK}")

    def text(self, ids: list[int], number: int) -> list[int]:
        """One of the texts."""
        start = (len(ids) - self.tokens) * number // max(self.texts - 1, 1)
        return ids[start : start + self.tokens]

    @property
    def edges(self) -> list[int]:
        """Ends of the position ranges: doubling, from an eighth of `tokens` (or a block) to all of
        them."""
        edges = [self.tokens]
        while len(edges) < 4 and edges[0] % (2 * BLOCK) == 0:
            edges.insert(0, edges[0] // 2)
        return edges


@torch.no_grad()
def losses(model: Any, text: Sequence[int], chunk: int) -> torch.Tensor:
    """Negative log-likelihood, in nats, of every token but the first: `[tokens - 1]`, float64."""
    cache = HiPCache(model.config)
    ids = torch.tensor([text], device=model.device)
    parts, before = [], None
    for start in range(0, len(text), chunk):
        some = ids[:, start : start + chunk]
        logits = model(some, use_cache=True, **{CACHE: cache}).logits[0].float()
        rows, targets = logits[:-1], some[0, 1:]
        if before is not None:
            rows, targets = torch.cat([before, rows]), some[0]
        parts.append(F.cross_entropy(rows, targets, reduction="none").double().cpu())
        before = logits[-1:].clone()
    return torch.cat(parts)


def read_losses(model: Any, text: Sequence[int], chunk: int, sparse: bool) -> dict[str, Any]:
    """Sums of the losses of each block of `BLOCK` tokens (the first has one token less), and what
    attention did at the end."""
    loss = losses(model, text, chunk)
    padded = torch.cat([torch.zeros(1, dtype=loss.dtype), loss])
    rows = explain(model) if sparse else []
    sums = padded.unflatten(0, (-1, BLOCK)).sum(1).tolist()
    return {"sums": sums, "read": density(rows), "path": path_of(rows)}


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the mean's confidence interval, if the values are independent; None for
    fewer than two."""
    if len(values) < 2:
        return None
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * stdev(values) / math.sqrt(len(values))


def ends(loss: float, half: float | None) -> list[float | None]:
    """Perplexity at both ends of an interval of half that width; None where there is none."""
    return [None if half is None else math.exp(loss + sign * half) for sign in (-1, 1)]


def range_row(
    settings: str, start: int, end: int, last: int, found: Rows, first: Rows
) -> dict[str, Any]:
    """The row of a range of positions. `first`: what was found with the first of the settings, on
    the same texts."""
    blocks = range(start // BLOCK, end // BLOCK)
    counts = [BLOCK - (block == 0) for block in blocks]
    tokens = sum(counts) * len(found)
    mean, means = [], []
    for texts in (found, first):
        sums = [one["sums"][start // BLOCK : end // BLOCK] for one in texts]
        mean.append(sum(map(sum, sums)) / tokens)
        means.append([s / n for own in sums for s, n in zip(own, counts, strict=True)])
    loss, ratio = mean[0], mean[0] - mean[1]
    low, high = ends(loss, interval(means[0]))
    ratio_low, ratio_high = ends(ratio, interval([a - b for a, b in zip(*means, strict=True)]))
    return {
        "settings": settings,
        "from": start,
        "to": end,
        "perplexity": math.exp(loss),
        "low": low,
        "high": high,
        "ratio": math.exp(ratio),
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "tokens": tokens,
        "read": fmean(one["read"] for one in found) if end == last else None,
        "path": ", ".join(dict.fromkeys(one["path"] for one in found)),
    }


def perplexity_rows(model: Any, ids: list[int], plan: PerplexityPlan, kept: Resumable) -> Rows:
    """The rows of the report: for each of the settings all positions, then each range of them.
    `read`, the density, is that of the last chunk."""
    kept.expect("texts", len(plan.configs) * plan.texts)
    rows = []
    first: Rows = []
    for name, config in plan.configs.items():
        sparse = use(model, config)
        found = []
        for number in range(plan.texts):
            work = partial(read_losses, model, plan.text(ids, number), plan.chunk, sparse)
            found.append(kept.get(("perplexity", config.to_dict(), plan.tokens, number), work))
        first = first or found
        ranges = [(0, plan.tokens), *zip([0, *plan.edges[:-1]], plan.edges, strict=True)]
        rows += [
            range_row(name, start, end, plan.tokens, found, first)
            for start, end in dict.fromkeys(ranges)
        ]
    return rows
