"""`hip-hf perplexity`: how well a checkpoint predicts a text, by position, with each of several settings.

A text is read a chunk at a time into a `HiPCache`, as chunked prefill reads a prompt, so memory is that of the cache and of
one chunk and the length is limited by patience alone. Every token but the first of a text is predicted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from textwrap import fill
from typing import Annotated, Any

import torch
import typer

from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, Device, Dtype, check_length, digest, load_to_measure
from hip_hf.eval.passkey import path_of, use
from hip_hf.eval.reporting import plots, report
from hip_hf.eval.reporting.presets import HELP, settings_of, sizes
from hip_hf.eval.reporting.publish import Json, Output, Plot, Report, Results, Targets, measured_on
from hip_hf.eval.reporting.resumable import Cells
from hip_hf.integration.explain import explain
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.versions import CACHE

# Tokens whose losses are kept as one sum: positions are counted, and intervals computed, in blocks of so many.
BLOCK = 128
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Plan:
    """What to read: `texts` windows of `tokens` tokens, evenly spread over the document, `chunk` tokens at a time.

    Raises:
        ValueError: `tokens` or `chunk` is no multiple of `BLOCK`.
    """

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
        """Ends of the position ranges: doubling, from an eighth of `tokens` (or a block) to all of them."""
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
        parts.append(torch.nn.functional.cross_entropy(rows, targets, reduction="none").double().cpu())
        before = logits[-1:].clone()
    return torch.cat(parts)


def read_text(model: Any, text: Sequence[int], chunk: int, sparse: bool) -> dict[str, Any]:
    """Sums of the losses of each block of `BLOCK` tokens (the first has one token less), and what attention did at the end."""
    loss = losses(model, text, chunk)
    padded = torch.cat([torch.zeros(1, dtype=loss.dtype), loss])
    rows = explain(model) if sparse else []
    shares = [row.share for row in rows if row.share is not None]
    path = path_of(rows) if rows else "sdpa"
    return {"sums": padded.unflatten(0, (-1, BLOCK)).sum(1).tolist(), "read": fmean(shares) if shares else 1.0, "path": path}


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the mean's confidence interval, if the values are independent; None for fewer than two."""
    if len(values) < 2:
        return None
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * stdev(values) / math.sqrt(len(values))


def make_row(
    settings: str, start: int, end: int, last: int, found: list[dict[str, Any]], first: list[dict[str, Any]]
) -> dict[str, Any]:
    """The row of a range of positions. `first`: what was found with the first of the settings, on the same texts."""
    blocks = range(start // BLOCK, end // BLOCK)
    counts = [BLOCK - (block == 0) for block in blocks]
    mean = [[one["sums"][block] / count for one in found for block, count in zip(blocks, counts, strict=True)]]
    mean += [[one["sums"][block] / count for one in first for block, count in zip(blocks, counts, strict=True)]]
    tokens = sum(counts) * len(found)
    loss, base = (sum(sum(one["sums"][block] for block in blocks) for one in which) / tokens for which in (found, first))
    half, apart = interval(mean[0]), interval([a - b for a, b in zip(*mean, strict=True)])
    bounds = [None if half is None else math.exp(loss + sign * half) for sign in (-1, 1)]
    ratios = [None if apart is None else math.exp(loss - base + sign * apart) for sign in (-1, 1)]
    return {
        "settings": settings,
        "from": start,
        "to": end,
        "perplexity": math.exp(loss),
        "low": bounds[0],
        "high": bounds[1],
        "ratio": math.exp(loss - base),
        "ratio_low": ratios[0],
        "ratio_high": ratios[1],
        "tokens": tokens,
        "read": fmean(one["read"] for one in found) if end == last else None,
        "path": ", ".join(dict.fromkeys(one["path"] for one in found)),
    }


def measure(
    model: Any, ids: list[int], plan: Plan, cells: Cells, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The rows of the report: for each of the settings all positions, then each range of them. `advance` is called after
    each text and setting. `read`, the share of keys read, is that of the last chunk."""
    rows, first = [], []
    for name, config in plan.configs.items():
        sparse = use(model, config)
        found = []
        for number in range(plan.texts):
            work = partial(read_text, model, plan.text(ids, number), plan.chunk, sparse)
            found.append(cells.get(("perplexity", config.to_dict(), plan.tokens, number), work))
            advance()
        first = first or found
        ranges = [(0, plan.tokens), *zip([0, *plan.edges[:-1]], plan.edges, strict=True)]
        rows += [make_row(name, start, end, plan.tokens, found, first) for start, end in dict.fromkeys(ranges)]
    return rows


def draw(document: dict[str, Any], file: Path) -> None:
    """Perplexity of each range of positions, a line per setting."""
    plt = plots.pyplot()
    rows = document["rows"]
    whole = max(row["to"] for row in rows)
    parts = [row for row in rows if (row["from"], row["to"]) != (0, whole)] or rows
    ranges = sorted({(row["from"], row["to"]) for row in parts})
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for name in dict.fromkeys(row["settings"] for row in parts):
        own = {(row["from"], row["to"]): row for row in parts if row["settings"] == name}
        heights = [own[span]["perplexity"] for span in ranges]
        bars = [[abs((own[span][side] or height) - height) for span, height in zip(ranges, heights, strict=True)]
                for side in ("low", "high")]  # fmt: skip
        axis.errorbar(range(len(ranges)), heights, yerr=bars, marker="o", capsize=3, label=fill(name, 44))
    axis.set_xticks(range(len(ranges)), [f"{plots.short(start)} to {plots.short(end)}" for start, end in ranges])
    axis.set_xlabel("position in the text (tokens)")
    axis.set_ylabel("perplexity, with the 95 % interval")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title("\n".join(fill(line, 100) for line in document["title"].split("\n")), fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    model: Annotated[str, typer.Argument(help="Hub name or folder; default: the shipped demo checkpoint.")] = str(CHECKPOINT),
    tokens: Annotated[str, typer.Option(help="Length of each text, like 8192 or 128K.")] = "8K",
    texts: Annotated[int, typer.Option(min=1, help="Texts, evenly spread over the document.")] = 2,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read at a time.")] = 2048,
    settings: Annotated[list[str], typer.Option(help=HELP)] = ["dense", "defaults"],  # noqa: B006
    budget: Annotated[int | None, typer.Option(help="Keys selected per query block.")] = None,
    sink: Annotated[int | None, typer.Option(help="First keys, always read.")] = None,
    window: Annotated[int | None, typer.Option(help="Latest keys, always read.")] = None,
    document: Annotated[Path, typer.Option(help="Plain text to predict.")] = DOCUMENT,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    output: Output = None,
    plot: Plot = None,
    report_file: Report = None,
    json: Json = False,
) -> None:
    """Perplexity of a local text by position, every layer and row sparse unless settings say otherwise.

    `ratio` compares with the first of the settings, on the same tokens. The 95 % intervals take blocks of 128 tokens as
    independent.
    """
    try:
        lengths = sizes(tokens)
        if len(lengths) > 1:
            raise ValueError(f"--tokens: got {tokens!r}, allowed: one length (its ranges of positions are shown)")
        configs = settings_of(settings, tokens=lengths[0], checkpoint=model, budget=budget, sink=sink, window=window)
        plan = Plan(configs, lengths[0], texts, chunk)
        targets = Targets(json, output, plot, report_file)
        text = document.read_text(encoding="utf-8")
        details = measured_on(model, document, dtype, configs, tokens=plan.tokens, texts=texts, chunk=chunk)
        cells = targets.cells("perplexity", **details, device=device, text=digest(text))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    loaded, _, ids = load_to_measure(model, device, text, dtype)
    check_length(plan.tokens, ids, document)
    with cells, report.progress() as progress:
        task = progress.add_task("texts", total=len(configs) * texts)
        rows = measure(loaded, ids, plan, cells, lambda: progress.advance(task))
    title = f"Perplexity by position: {texts} text{'s' * (texts > 1)} of {plan.tokens:,} tokens, ratio to {next(iter(configs))}"
    targets.publish(Results("perplexity", title, rows, details, draw), cells)
