"""How often decoding finds its pages on the device: a real document, device pools of a fraction of the cache.

    python benchmarks/offload_hits.py [--length 65536] [--fraction 8] [--budget 512] [--tokens 128] [--output FILE]

The demo checkpoint reads the first tokens of the shipped document (from the start again where it is shorter) in one prefill,
then decodes greedily. Statistics are those of decoding alone, from its first step, which finds the pools empty. A hit is a page
found on the device: in the pool that was asked, or (`shared`) in the layer's other pool.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hip_hf
from hip_hf.cache.offload import Statistics, Traffic
from hip_hf.cache.pool import PAGE
from hip_hf.eval.report import machine

ASSETS = Path(hip_hf.__file__).parent / "assets"


def difference(after: Traffic, before: Traffic) -> Traffic:
    return replace(after, **{name: value - asdict(before)[name] for name, value in asdict(after).items()})


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 65536), ("fraction", 8), ("budget", 512), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "checkpoint", attn_implementation="hip").eval()
    hip_hf.configure(model, budget=given.budget, dense_layers=0, dense_below=0)
    ids = AutoTokenizer.from_pretrained(ASSETS / "checkpoint")((ASSETS / "document.txt").read_text())["input_ids"]
    ids = (ids * (given.length // len(ids) + 1))[: given.length]
    cache = hip_hf.HiPCache(model.config, offload="cpu", device_pages=given.length // PAGE // given.fraction)
    token = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    before = cache.statistics()
    for _ in range(given.tokens):
        token = model(token, past_key_values=cache).logits.argmax(-1)
    after = cache.statistics()
    rows = {name: difference(after[name], before[name]) for name in after}
    rows["together"] = Statistics(rows).together
    document = {name: {**asdict(row), "hit_rate": row.hit_rate} for name, row in rows.items()}
    print(Statistics({name: row for name, row in rows.items() if name != "together"}))
    if given.output:
        conditions = {name: value for name, value in vars(given).items() if name != "output"}
        given.output.write_text(json.dumps({**conditions, "traffic": document, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
