"""Generation in continuous batching, and the same prompts one by one."""

from __future__ import annotations

import torch
from families import make_batch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

LENGTHS = [40, 7, 85, 23, 61, 12, 150, 33]


def prompts() -> list[list[int]]:
    return [
        make_batch([length], seed)["input_ids"][0].tolist() for seed, length in enumerate(LENGTHS)
    ]


def batched(
    model: PreTrainedModel, given: list[list[int]], new: int = 8, **sizes: int
) -> list[list[int]]:
    """Few tokens a call, so that prompts are split and wait for each other."""
    sizes = {"num_blocks": 64, "max_batch_tokens": 64, **sizes}
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(
        given, config, ContinuousBatchingConfig(**sizes), progress_bar=False
    )
    return [
        found[name].generated_tokens
        for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1]))
    ]


def alone(model: PreTrainedModel, given: list[list[int]], new: int = 8) -> list[list[int]]:
    out = []
    for prompt in given:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
            )
        out.append(made[0, len(prompt) :].tolist())
    return out
