"""Peak memory of a prompt read in chunks (`prefill_chunk_size`), beyond what its cache holds: it
must not grow with the prompt.

    python benchmarks/chunked_prefill.py [--lengths 32768,65536,131072] [--chunk 2048]
        [--output FILE]

Each length has a process of its own: a tiny random model reads random tokens through `generate`
into a `HiPCache`, and the process reads its own memory from the operating system. `cache_MiB`: the
pages and summaries written; `spare_MiB`: those allocated beside them, untouched as yet;
`extra_MiB`: what the peak was above the memory before and the cache, ids, masks and positions (some
integers a token) included. Memory that is freed goes back to the system at once, so that the peak
is of what lives (glibc).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch

from hip_hf.eval.measure.memory import MIB, MemoryMeter
from hip_hf.eval.reporting.report import machine

SHAPE: dict[str, Any] = dict(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
HEADS, DIM = 2, 32


# Blocks of this many bytes and more are given back when freed. By default glibc raises the limit to
# the largest block freed so far, and keeps smaller ones for itself: the tables of a growing pyramid
# among them.
GIVEN_BACK = "131072"


def held(cache: Any) -> tuple[int, int]:
    """Bytes of the pages that hold tokens and of the summaries written so far; and of those that
    wait to be used."""
    used = allocated = 0
    for layer in cache.paged:
        used += layer.pool.bytes(layer.pool.used)
        allocated += layer.pool.bytes(len(layer.pool.ref_count))
        for row in layer.hip_state.rows.values():
            for level, table in enumerate(row.pyramid.levels):
                used += (
                    row.pyramid.count(level)
                    * table.shape[0]
                    * table.shape[2]
                    * table.element_size()
                )
                allocated += table.numel() * table.element_size()
    return used, allocated - used


def measure(length: int, chunk: int) -> dict[str, Any]:
    """One row, measured in the calling process."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import hip_hf

    config = LlamaConfig(
        **SHAPE, num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=length + 2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("hip")
    hip_hf.configure(model, budget=256, window=256, dense_layers=0, dense_below=0)
    options = dict(do_sample=False, max_new_tokens=2, pad_token_id=0, prefill_chunk_size=chunk)

    def read(tokens: int) -> Any:
        ids, cache = torch.randint(3, 90, (1, tokens)), hip_hf.HiPCache(model.config)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        assert {row.path for row in hip_hf.explain(model)} == {"sparse"}
        return cache

    read(2 * chunk)  # whatever is allocated once
    meter = MemoryMeter(torch.device("cpu"))
    cache = read(length)
    peak = meter.peak_mib()
    assert peak is not None, "the system does not say how much memory a process has"
    kept, spare = (size / MIB for size in held(cache))
    sizes = {"cache_MiB": kept, "spare_MiB": spare, "peak_MiB": peak, "extra_MiB": peak - kept}
    return {"length": length, "chunk": chunk, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = (
        GIVEN_BACK  # which children read as they start
    )
    rows = []
    for length in map(int, given.lengths.split(",")):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            rows.append(fresh.apply(measure, (length, given.chunk)))
        print(json.dumps(rows[-1]), flush=True)
    if given.output:
        given.output.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
