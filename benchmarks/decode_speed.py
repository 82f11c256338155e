"""Tokens per second of decoding after a long context: `hip` with its paged cache against `sdpa`
with the dynamic cache.

    python benchmarks/decode_speed.py [--lengths 16384,65536] [--tokens 256] [--output FILE]

The demo checkpoint's shape with random weights and random keys: a context costs the same whatever
it says. All lengths and both attentions take turns, a part of the tokens each, so that what else
the machine does falls on all alike. Figures are medians over the parts, in milliseconds a token: of
the clock, and of CPU time (`cpu`), which other work disturbs less (`--threads 1` for that).
`growth` is the median over the parts of the longest context's time over the shortest's in the same
turn, less 1. The first step after the context, in which `hip` summarises it (prefill would have
done so), counts for neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hip_hf
from hip_hf.eval.reporting.report import machine

CHECKPOINT = Path(hip_hf.__file__).parent / "assets" / "checkpoint"
PARTS = 8
CLOCKS = ("ms", "cpu_ms")


def make_model(implementation: str, longest: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.max_position_embeddings = longest
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(implementation)
    return model


def filled(model: PreTrainedModel, length: int) -> Any:
    """The cache that Transformers makes for the model, with random keys and values."""
    cache = DynamicCache(config=model.config)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    layers: list[Any] = cache.layers
    for layer in layers:
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        layer.update(
            torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        )
    return cache


@torch.inference_mode()
def steps(model: PreTrainedModel, cache: Any, count: int) -> tuple[float, float]:
    """Milliseconds a step, of `count` greedy steps: by the clock, and of CPU time."""
    token = torch.tensor([[5]])
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / count * 1e3, (time.process_time() - cpu) / count * 1e3


def measure(lengths: list[int], tokens: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row a length, and how much `hip` grows from the shortest to the longest."""
    models = {name: make_model(name, 2 * max(lengths)) for name in ("hip", "sdpa")}
    cases = {
        (length, name): filled(model, length)
        for length in lengths
        for name, model in models.items()
    }
    spent: dict[tuple[int, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for (_, name), cache in cases.items():
        steps(models[name], cache, 1)
    for _ in range(PARTS):
        for case, cache in cases.items():
            spent[case].append(steps(models[case[1]], cache, tokens // PARTS))
    for layer in hip_hf.explain(models["hip"]):
        assert (layer.path, layer.cache) == ("sparse", "pages")
    rows = []
    for length in lengths:
        row: dict[str, Any] = {
            "length": length,
            "tokens": tokens // PARTS * PARTS,
            "threads": torch.get_num_threads(),
        }
        for i, clock in enumerate(CLOCKS):
            for name in models:
                row[f"{name}_{clock}"] = statistics.median(
                    times[i] for times in spent[length, name]
                )
            row[f"ratio_{clock}"] = row[f"sdpa_{clock}"] / row[f"hip_{clock}"]
        rows.append(row)
    turns = list(zip(spent[max(lengths), "hip"], spent[min(lengths), "hip"], strict=True))
    growth = {
        clock: statistics.median(long[i] / short[i] for long, short in turns) - 1
        for i, clock in enumerate(CLOCKS)
    }
    return rows, growth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="16384,65536")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows, growth = measure([int(length) for length in given.lengths.split(",")], given.tokens)
    document = {"rows": rows, "growth": growth}
    print(json.dumps(document, indent=1))
    if given.output:
        given.output.write_text(json.dumps({**document, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
