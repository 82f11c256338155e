"""Tokens per second of decoding after a long context: `hip` with its paged cache against `sdpa` with the dynamic cache.

    python benchmarks/decode_speed.py [--lengths 16384,65536] [--tokens 256] [--output FILE]

The demo checkpoint's shape with random weights and random keys: a context costs the same whatever it says. The two take turns,
a part of the tokens each; figures are medians over the parts, in milliseconds a token: of the clock, and of CPU time (`cpu`),
which other work on the machine disturbs less; `--threads 1` for that. The first step after the context, in which `hip`
summarises it (prefill would have done so), is not counted for either.
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
from hip_hf.eval.report import machine

CHECKPOINT = Path(hip_hf.__file__).parent / "assets" / "checkpoint"
PARTS = 8


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
    for layer in cache.layers:
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        layer.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    return cache


@torch.inference_mode()
def steps(model: PreTrainedModel, cache: Any, count: int) -> tuple[float, float]:
    """Milliseconds a step, of `count` greedy steps: by the clock, and of CPU time."""
    token = torch.tensor([[5]])
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / count * 1e3, (time.process_time() - cpu) / count * 1e3


def measure(length: int, tokens: int) -> dict[str, Any]:
    models = {name: make_model(name, 2 * length) for name in ("hip", "sdpa")}
    caches = {name: filled(model, length) for name, model in models.items()}
    for name, model in models.items():
        steps(model, caches[name], 1)
    part = tokens // PARTS
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(PARTS):
        for name, model in models.items():
            spent[name].append(steps(model, caches[name], part))
    row: dict[str, Any] = {"length": length, "tokens": part * PARTS, "threads": torch.get_num_threads()}
    for i, clock in enumerate(("ms", "cpu_ms")):
        row |= {f"{name}_{clock}": statistics.median(times[i] for times in parts) for name, parts in spent.items()}
        row[f"ratio_{clock}"] = row[f"sdpa_{clock}"] / row[f"hip_{clock}"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16384,65536")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for length in map(int, given.lengths.split(",")):
        rows.append(measure(length, given.tokens))
        print(json.dumps(rows[-1]), flush=True)
    if given.output:
        given.output.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
