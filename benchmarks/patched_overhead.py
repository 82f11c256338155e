"""Python time per layer and decode step: a patched model against the same one by the registered
attention, and `sdpa`.

    python benchmarks/patched_overhead.py [--context 512] [--steps 200] [--output FILE]

A model of many tiny Llama layers, so that a step is Python and little else, with the default
`decode_refresh` and with one selection for all steps. All take turns, a part of the steps each, so
that what else the machine does falls on all alike. Figures are medians over the parts, in
microseconds of CPU time a layer and step, on one thread; `ratio` is the median over the parts of
the patched model's time over the registered one's in the same turn.
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
from hip_hf.config import HiPConfig
from hip_hf.eval.reporting.report import machine

LAYERS, PARTS = 32, 20
# Steps that a selection serves: the default, and more than are measured.
REFRESHES = (HiPConfig().decode_refresh, 100_000)
TINY: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
)  # fmt: skip


def make_model(name: str, refresh: Any, longest: int) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**TINY, max_position_embeddings=longest)
    ).eval()
    model.set_attn_implementation("sdpa" if name == "sdpa" else "hip")
    if name != "sdpa":
        hip_hf.configure(
            model,
            budget=64,
            sink=16,
            window=64,
            dense_layers=0,
            dense_below=0,
            decode_refresh=refresh,
        )
    if name == "patched":
        hip_hf.patch(model)
    return model


@torch.inference_mode()
def filled(model: PreTrainedModel, context: int) -> Any:
    """The cache after a prompt of that many tokens."""
    return model(torch.randint(3, 60, (1, context)), use_cache=True).past_key_values


def measure(context: int, count: int) -> list[dict[str, Any]]:
    """One row for each way to attend."""
    cases = [
        ("sdpa", None),
        *((name, refresh) for refresh in REFRESHES for name in ("registered", "patched")),
    ]
    models = {case: make_model(*case, 2 * context + count) for case in cases}
    caches = {case: filled(model, context) for case, model in models.items()}
    spent: dict[Any, list[float]] = {case: [] for case in cases}
    for case, model in models.items():
        steps(model, caches[case], 2)
    for _ in range(PARTS):
        for case, model in models.items():
            spent[case].append(steps(model, caches[case], count // PARTS)[1] * 1e3 / LAYERS)
    rows = []
    for (name, refresh), times in spent.items():
        other = spent.get(("registered", refresh)) if name == "patched" else None
        ratio = (
            None
            if other is None
            else statistics.median(p / r for p, r in zip(times, other, strict=True))
        )
        row = {
            "attention": name,
            "decode_refresh": refresh,
            "context": context,
            "steps": count // PARTS * PARTS,
        }
        rows.append(row | {"us_per_layer": statistics.median(times), "ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    document = {
        "command": "patched_overhead",
        "rows": measure(given.context, given.steps),
        "machine": machine(),
    }
    print(json.dumps(document, indent=1))
    if given.output:
        given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
