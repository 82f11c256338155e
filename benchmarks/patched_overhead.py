"""Python time per layer and decode step: a patched model against the same one by the registered attention, and `sdpa`.

    python benchmarks/patched_overhead.py [--context 512] [--steps 200] [--output FILE]

A model of many tiny Llama layers, so that a step is Python and little else. All three take turns, a part of the steps each, so
that what else the machine does falls on all alike. Figures are medians over the parts, in microseconds of CPU time a layer and
step, on one thread; `ratio` is the median over the parts of the patched model's time over the registered one's in the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from decode_speed import steps
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hip_hf
from hip_hf.eval.report import machine

LAYERS, PARTS = 32, 20
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16,
)  # fmt: skip


def make_model(name: str, longest: int) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, max_position_embeddings=longest)).eval()
    model.set_attn_implementation("sdpa" if name == "sdpa" else "hip")
    if name != "sdpa":
        hip_hf.configure(model, budget=64, sink=16, window=64, dense_layers=0, dense_below=0)
    if name == "patched":
        hip_hf.patch(model)
    return model


@torch.inference_mode()
def filled(model: PreTrainedModel, context: int) -> Any:
    """The cache after a prompt of that many tokens."""
    return model(torch.randint(3, 60, (1, context)), use_cache=True).past_key_values


def measure(context: int, count: int) -> list[dict[str, Any]]:
    """One row for each way to attend."""
    models = {name: make_model(name, 2 * context + count) for name in ("sdpa", "registered", "patched")}
    caches = {name: filled(model, context) for name, model in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        steps(model, caches[name], 2)
    for _ in range(PARTS):
        for name, model in models.items():
            spent[name].append(steps(model, caches[name], count // PARTS)[1] * 1e3 / LAYERS)
    turns = [p / r for p, r in zip(spent["patched"], spent["registered"], strict=True)]
    rows = []
    for name, times in spent.items():
        row = {"attention": name, "context": context, "steps": count // PARTS * PARTS, "us_per_layer": statistics.median(times)}
        rows.append(row | {"ratio": statistics.median(turns) if name == "patched" else None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    document = {"command": "patched_overhead", "rows": measure(given.context, given.steps), "machine": machine()}
    print(json.dumps(document, indent=1))
    if given.output:
        given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
