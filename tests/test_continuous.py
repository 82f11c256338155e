"""Continuous batching: the tokens of the ordinary path, read through the pages of Transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_batch, make_model
from transformers import GenerationConfig, PreTrainedModel

import hip_hf
from hip_hf.integration import paged

LENGTHS = [40, 7, 85, 23, 61, 12, 50, 33]


def prompts() -> list[list[int]]:
    return [make_batch([length], seed)["input_ids"][0].tolist() for seed, length in enumerate(LENGTHS)]


def batched(model: PreTrainedModel, new: int = 8) -> list[list[int]]:
    """Eight requests; the cache holds few tokens at a time, so that they arrive one after another."""
    from transformers.generation import continuous_batching

    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = dict(num_blocks=24, max_batch_tokens=64)
    options: dict[str, Any] = {}
    kind = getattr(continuous_batching, "ContinuousBatchingConfig", None)
    if kind is not None:
        options["continuous_batching_config"] = kind(**sizes)
    found = model.generate_batch(prompts(), generation_config=config, progress_bar=False, **options)
    return [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1]))]


def alone(model: PreTrainedModel, new: int = 8) -> list[list[int]]:
    out = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        out.append(made[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_equal_the_ordinary_path(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a covering budget: how prompts are split is the scheduler's affair. Read through the sparse code."""
    model = make_model(family, budget=1024)
    expected = alone(model)
    read = []
    original = paged.TokenMajorStore.index
    monkeypatch.setattr(paged.TokenMajorStore, "read", _counted(read, paged.TokenMajorStore.read))
    assert batched(model) == expected
    assert original is paged.TokenMajorStore.index
    assert read
    assert {row.cache for row in hip_hf.explain(model)} == {"continuous batching"}


def _counted(calls: list[int], function: Any) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return counted


def test_a_cache_of_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="cache: got a object of unknown layout"):
        paged.find_place(object(), 0)
