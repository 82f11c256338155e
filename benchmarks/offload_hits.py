"""How often decoding finds its pages on the device: a real document, device pools of a fraction of
the cache.

    python benchmarks/offload_hits.py [--length 65536] [--fraction 8] [--budget 512] [--tokens 256]
        [--output FILE]

The demo checkpoint reads the first tokens of the shipped document in one prefill, at the default
settings but for the budget and without dense layers. Then it decodes, twice from there: the
`document`'s own next tokens, and its own (`greedy`; so far beyond the length it was trained for it
soon repeats itself). Each begins with empty pools, and their first misses count.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hip_hf
from hip_hf.cache.offload import Statistics
from hip_hf.cache.pool import PAGE
from hip_hf.eval.reporting.report import machine

ASSETS = Path(hip_hf.__file__).parent / "assets"


def decode(
    model: PreTrainedModel,
    cache: hip_hf.HiPCache,
    token: torch.Tensor,
    given: list[int] | None,
    steps: int,
) -> Statistics:
    """Statistics of the decode steps: over the tokens that are given, or greedily."""
    for step in range(steps):
        token = model(token, past_key_values=cache).logits.argmax(-1)
        if given is not None:
            token = torch.tensor([[given[step]]])
    return cache.statistics()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("length", 65536), ("fraction", 8), ("budget", 512), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        ASSETS / "checkpoint", attn_implementation="hip"
    ).eval()
    hip_hf.configure(model, hip_hf.HiPConfig(budget=given.budget, dense_layers=0, dense_below=0))
    ids = AutoTokenizer.from_pretrained(ASSETS / "checkpoint")(
        (ASSETS / "document.txt").read_text()
    )["input_ids"]
    if len(ids) <= given.length + given.tokens:
        raise SystemExit(
            f"--length: got {given.length}, allowed: below {len(ids) - given.tokens}, "
            "what the document has"
        )
    cache = hip_hf.HiPCache(
        model.config, offload="cpu", device_pages=given.length // PAGE // given.fraction
    )
    token = model(
        torch.tensor([ids[: given.length]]), past_key_values=cache, logits_to_keep=1
    ).logits.argmax(-1)
    following = ids[given.length :]
    rows = []
    for text, tokens in (("document", following), ("greedy", None)):
        first = token if tokens is None else torch.tensor([[tokens[0]]])
        found = decode(model, copy.deepcopy(cache), first, tokens and tokens[1:], given.tokens)
        print(f"{text}\n{found}", flush=True)
        traffic = {**found, "together": found.together}
        rows.append(
            {
                "text": text,
                **{
                    name: {**asdict(row), "hit_rate": row.hit_rate} for name, row in traffic.items()
                },
            }
        )
    if given.output:
        conditions = {name: value for name, value in vars(given).items() if name != "output"}
        given.output.write_text(
            json.dumps({**conditions, "rows": rows, "machine": machine()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
