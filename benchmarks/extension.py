"""Context extension on the demo checkpoint: pass keys and perplexity beyond the 8,192 tokens it was trained for.

    python benchmarks/extension.py

Perplexity is that of the same tokens with more and more of the document before them, so that only the length changes; every
layer and row is sparse under `extend`. Writes `benchmarks/results/extension.json` and `extension.png`.
"""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.cache.hip_cache import HiPCache
from hip_hf.config import HiPConfig
from hip_hf.eval import passkey, plots, report
from hip_hf.eval.documents import CHECKPOINT, DOCUMENT, load
from hip_hf.eval.presets import settings_of, sizes

RESULTS = Path(__file__).parent / "results"
SETTINGS = {"dense": "dense", "extended": '{"extend": "streaming", "budget": 256}'}
# Dense attention is quadratic, and has collapsed well before.
DENSE_UP_TO = 32768
# Tokens whose loss is measured, and tokens that are read at once.
TARGETS, CHUNK = 2048, 2048


@torch.inference_mode()
def loss_of(model: Any, config: HiPConfig, text: list[int]) -> float:
    """Mean loss of the last `TARGETS` tokens of a text, which is read a chunk at a time."""
    passkey.use(model, config)
    cache, ids, total = HiPCache(model.config), torch.tensor([text]), 0.0
    first = len(text) - TARGETS - 1  # the row that predicts the first of them
    bounds = [0, *range(first % CHUNK or CHUNK, first + 1, CHUNK), *range(first + CHUNK, len(text) - 1, CHUNK), len(text) - 1]
    for start, end in pairwise(bounds):
        keep = 0 if start >= first else 1
        logits = model(ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]
        if start >= first:
            total += float(torch.nn.functional.cross_entropy(logits.float(), ids[0, start + 1 : end + 1], reduction="sum"))
    return total / TARGETS


def perplexities(model: Any, config: HiPConfig, tokens: list[int], length: int, texts: int) -> float:
    """Over the same targets whatever the length: they end at places spread over what the longest text leaves of the document."""
    ends = [len(tokens) - (len(tokens) * 3 // 5) * i // max(texts, 1) for i in range(texts)]
    losses = [loss_of(model, config, tokens[end - length : end]) for end in ends]
    return math.exp(sum(losses) / len(losses))


def pass_keys(model: Any, tokenizer: Any, config: HiPConfig, tokens: list[int], length: int, depths: int, samples: int) -> Any:
    """Counted answers to prompts of one length, at evenly spaced depths: the prompts of `hip-hf passkey`."""
    sparse, cell = passkey.use(model, config), passkey.Cell()
    for i in range(depths):
        place = i / (depths - 1)
        for sample in range(samples):
            rng = random.Random(f"0 {length} {place:.6f} {sample}")
            cell += passkey.ask(model, tokenizer, [passkey.make_sample(tokenizer, tokens, length, place, 1, rng)], sparse)
    return cell


def draw(rows: list[dict[str, Any]], trained: int, file: Path) -> None:
    pyplot = plots.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind, name in zip(axes, ("pass keys", "perplexity"), ("answers entirely right", "perplexity"), strict=True):
        for settings in SETTINGS:
            line = [row for row in rows if row["settings"] == settings and row["what"] == kind]
            axis.plot([row["length"] for row in line], [row["value"] for row in line], marker="o", label=settings)
        axis.axvline(trained, color="grey", linestyle=":", label="trained length")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_ylabel(name)
        axis.legend()
    axes[1].set_yscale("log")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(
    lengths: Annotated[str, typer.Option(help="Of the pass-key prompts.")] = "8K,32K",
    contexts: Annotated[str, typer.Option(help="Of the texts for perplexity.")] = "8K,16K,32K,64K",
    depths: int = 11,
    samples: int = 2,
    texts: Annotated[int, typer.Option(help="Texts for perplexity.")] = 3,
    output: Path = RESULTS / "extension.json",
) -> None:
    """Measure and draw; what an interrupted run has finished is not done again."""
    model, tokenizer = load(str(CHECKPOINT), "sdpa")
    tokens = tokenizer.encode(DOCUMENT.read_text(), add_special_tokens=False, verbose=False)
    trained = model.config.max_position_embeddings
    configs = {name: settings_of([text])[text] for name, text in SETTINGS.items()}
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output.exists() else []
    jobs = [(what, length, name) for what, some in (("perplexity", contexts), ("pass keys", lengths)) for length in sizes(some)
            for name in configs if name != "dense" or length <= DENSE_UP_TO]  # fmt: skip
    for what, length, name in jobs:
        if any((row["what"], row["length"], row["settings"]) == (what, length, name) for row in rows):
            continue
        row: dict[str, Any] = {"what": what, "length": length, "settings": name}
        if what == "perplexity":
            row["value"] = perplexities(model, configs[name], tokens, length, texts)
        else:
            cell = pass_keys(model, tokenizer, configs[name], tokens, length, depths, samples)
            low, high = passkey.wilson(cell.exact, cell.samples)
            row |= {"value": cell.exact / cell.samples, "low": low, "high": high, "samples": cell.samples}
            row["digits"] = cell.digits / (cell.samples * passkey.DIGITS)
        rows.append(row)
        typer.echo(row)
        found = {"trained": trained, "texts": texts, "rows": rows, "configs": {n: c.to_dict() for n, c in configs.items()}}
        output.write_text(json.dumps({**found, "machine": report.machine()}, indent=1) + "\n")
    draw(rows, trained, output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
