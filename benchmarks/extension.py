"""Context extension on the demo checkpoint: pass keys and perplexity beyond the 8,192 tokens it was
trained for.

    python benchmarks/extension.py

Perplexity is that of the same tokens with more and more of the document before them, so that only
the length changes; under `extend` every layer is sparse, and every row but those of `dense_tail`,
where it is named. Writes `benchmarks/results/extension.json`, `extension.png` and, for the
documentation, the table `extension.md`. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hip_hf.cli.inputs import load_to_measure, user_errors
from hip_hf.cli.presets import settings_of, sizes
from hip_hf.cli.publish import Targets, model_name
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import passkey
from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, digest
from hip_hf.eval.measure.passkey import PasskeyCounts
from hip_hf.eval.reporting import report
from hip_hf.eval.reporting.plots import drawing
from hip_hf.eval.reporting.resumable import Resumable
from hip_hf.integration.hip_cache import HiPCache

RESULTS = Path(__file__).parent / "results"
EXTENDED = '{"extend": "streaming"}'
# Dense attention is quadratic, and has collapsed well before.
DENSE_UP_TO = 32768
# Tokens whose loss is measured, and tokens that are read at once.
TARGETS, CHUNK = 2048, 2048
# Pass keys lie at tenths of the document. So many of them apart, any first few prompts are spread
# over all of it.
DEPTHS, APART = 11, 4


@torch.inference_mode()
def loss_of(model: Any, config: HiPConfig, text: list[int]) -> float:
    """Mean loss of the last `TARGETS` tokens of a text, which is read a chunk at a time."""
    passkey.use(model, config)
    cache, ids, total = HiPCache(model.config), torch.tensor([text]), 0.0
    first = len(text) - TARGETS - 1  # the row that predicts the first of them
    bounds = [
        0,
        *range(first % CHUNK or CHUNK, first + 1, CHUNK),
        *range(first + CHUNK, len(text) - 1, CHUNK),
        len(text) - 1,
    ]
    for start, end in pairwise(bounds):
        keep = 0 if start >= first else 1
        logits = model(
            ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=keep
        ).logits[0]
        if start >= first:
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.float(), ids[0, start + 1 : end + 1], reduction="sum"
                )
            )
    return total / TARGETS


def ends_of(tokens: int, texts: int) -> list[int]:
    """Where the texts for perplexity end, the same at every length: spread over the last three
    fifths of the document."""
    return [tokens - tokens * 3 // 5 * i // texts for i in range(texts)]


def ask(
    model: Any, tokenizer: Any, config: HiPConfig, tokens: list[int], length: int, number: int
) -> PasskeyCounts:
    """The count of one pass-key prompt, as `hip-hf passkey` makes them."""
    sample, place = number // DEPTHS, number * APART % DEPTHS / (DEPTHS - 1)
    rng = random.Random(f"0 {length} {place:.6f} {sample}")
    prompt = passkey.make_sample(tokenizer, tokens, length, place, 1, rng)
    return passkey.answer_samples(model, tokenizer, [prompt], passkey.use(model, config))


def measure(
    model: Any,
    tokenizer: Any,
    tokens: list[int],
    plan: dict[str, Any],
    configs: dict[str, HiPConfig],
    kept: Resumable,
) -> Iterator[dict[str, Any]]:
    """The rows of the report, of what `kept` has not yet."""
    row: dict[str, Any]
    for name, config in configs.items():
        for length in plan["contexts"]:
            if name == "dense" and length > DENSE_UP_TO:
                continue
            losses = []
            for end in ends_of(len(tokens), plan["texts"]):
                text = tokens[end - length : end]
                losses.append(
                    kept.get(
                        ("perplexity", name, length, end), partial(loss_of, model, config, text)
                    )
                )
            row = {
                "what": "perplexity",
                "settings": name,
                "length": length,
                "value": math.exp(sum(losses) / len(losses)),
            }
            yield row | {"low": None, "high": None, "digits": None, "samples": len(losses)}
        for length in plan["lengths"]:
            far = name == "dense" and length > plan["trained"]
            cell = PasskeyCounts()
            for number in range(plan["dense_samples"] if far else plan["samples"]):
                work = partial(ask, model, tokenizer, config, tokens, length, number)
                cell += PasskeyCounts.read(kept.get(("pass keys", name, length, number), work))
            counted = cell.row(name, length, None)
            row = {
                "what": "pass keys",
                "settings": name,
                "length": length,
                "value": counted["accuracy"],
            }
            yield row | {key: counted[key] for key in ("low", "high", "digits", "samples")}


def draw(document: dict[str, Any], file: Path) -> None:
    """Pass keys with intervals, and perplexity, by length: a line for each of the settings."""
    kinds = {"pass keys": "answers entirely right", "perplexity": "perplexity"}
    with drawing(file, (10, 4), 1, 2) as (_, (axes,)):
        for axis, (kind, name) in zip(axes, kinds.items(), strict=True):
            for settings in document["configs"]:
                line = [
                    row
                    for row in document["rows"]
                    if row["settings"] == settings and row["what"] == kind
                ]
                line.sort(key=lambda row: row["length"])
                x, y = [row["length"] for row in line], [row["value"] for row in line]
                axis.plot(x, y, marker="o", label=settings)
                if kind == "pass keys":
                    axis.fill_between(
                        x, [row["low"] for row in line], [row["high"] for row in line], alpha=0.15
                    )
            axis.axvline(document["trained"], color="grey", linestyle=":", label="trained length")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({row["length"] for row in document["rows"]}))
            axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:.0f}K")
            axis.minorticks_off()
            axis.set(xlabel="tokens", ylabel=name)
            axis.legend()
        axes[0].set_ylim(-0.03, 1.03)


def markdown(document: dict[str, Any]) -> str:
    """A line for each kind of figure and setting, a column for each length."""
    lengths = sorted({row["length"] for row in document["rows"]})
    found = {(row["what"], row["settings"], row["length"]): row for row in document["rows"]}
    lines = [
        f"| | {' | '.join(f'{length // 1024}K' for length in lengths)} |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for what in ("pass keys", "perplexity"):
        for settings in document["configs"]:
            texts = []
            for length in lengths:
                row = found.get((what, settings, length))
                if row is None:
                    texts.append("")
                elif what == "perplexity":
                    texts.append(f"{row['value']:.1f}")
                else:
                    right = round(row["value"] * row["samples"])
                    texts.append(
                        f"{right} of {row['samples']} [{row['low']:.0%}, {row['high']:.0%}]"
                    )
            lines.append(f"| {what}, {settings} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main(
    lengths: Annotated[str, typer.Option(help="Of the pass-key prompts.")] = "8K,32K",
    contexts: Annotated[str, typer.Option(help="Of the texts for perplexity.")] = "8K,16K,32K,64K",
    samples: Annotated[int, typer.Option(min=1, help="Pass-key prompts of each length.")] = 20,
    dense_samples: Annotated[
        int, typer.Option(min=1, help="The same for dense attention beyond the trained length.")
    ] = 8,
    texts: Annotated[int, typer.Option(min=1, help="Texts for perplexity.")] = 4,
    budgets: Annotated[str, typer.Option(help="Keys selected per query block.")] = "256,1024",
    output: Path = RESULTS / "extension.json",
) -> None:
    """Measure, draw, and write the table."""
    text = DOCUMENT.read_text(encoding="utf-8")
    with user_errors():
        plan = {
            "lengths": sizes(lengths),
            "contexts": sizes(contexts),
            "samples": samples,
            "dense_samples": dense_samples,
        }
        configs = {}
        for tail in (0, HiPConfig().dense_tail):
            for budget in sizes(budgets):
                name = f"streaming, budget {budget}" + f", dense_tail {tail}" * bool(tail)
                configs[name] = settings_of([EXTENDED], budget=budget, dense_tail=tail)[EXTENDED]
        configs |= settings_of(["dense"])
        details = {
            "model": model_name(str(CHECKPOINT)), "document": DOCUMENT.name, **plan, "texts": texts,
            "targets": TARGETS,
            "configs": {name: config.to_dict() for name, config in configs.items()},
        }  # fmt: skip
        targets = Targets(output=output, plot=output.with_suffix(".png"))
        kept = targets.kept("extension", **details, text=digest(text))
    model, tokenizer, tokens = load_to_measure(str(CHECKPOINT), "cpu", text, "fp32")
    details["trained"] = model.config.max_position_embeddings
    rows = []
    with kept:
        for row in measure(model, tokenizer, tokens, details, configs, kept):
            report.notes.print(row)
            rows.append(row)
    title = (
        f"Context extension, {details['model']}, trained for {details['trained']:,} tokens; "
        "pass keys with 95 % intervals"
    )
    document = targets.publish("extension", title, rows, details, kept, draw=draw)
    output.with_suffix(".md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
