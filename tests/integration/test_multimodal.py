"""Wrappers of vision and language: the language part attends through `hip`, the vision part is left
as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import IMAGE, SPARSE, make_llava, make_qwen2_vl
from transformers import PreTrainedModel

import hip_hf
from hip_hf import HiPCache

PATCHES = 16  # tokens of an image
Inputs = dict[str, torch.Tensor]


def prompt(tokens: int, before: list[int], after: list[int]) -> torch.Tensor:
    """Random text around the tokens of an image."""
    ids = torch.randint(3, IMAGE - 5, (1, tokens), generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[*before, *([IMAGE] * PATCHES), *after]])
    return torch.cat([ids[:, : tokens // 3], image, ids[:, tokens // 3 :]], dim=1)


def llava_inputs() -> Inputs:
    ids = prompt(150, [], [])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def qwen_inputs() -> Inputs:
    ids = prompt(150, [92], [93])
    pixels = torch.randn(PATCHES * 4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    kinds = (ids == IMAGE).int()
    grid = torch.tensor([[1, 8, 8]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    return {**text, "pixel_values": pixels, "image_grid_thw": grid}


MODELS: dict[str, tuple[Callable[[Any], PreTrainedModel], Callable[[], Inputs]]] = {
    "llava": (make_llava, llava_inputs),
    "qwen2_vl": (make_qwen2_vl, qwen_inputs),
}
HIP = {"text_config": "hip", "vision_config": "eager"}


def make(name: str, attention: Any, **settings: Any) -> PreTrainedModel:
    model = MODELS[name][0](attention).eval()
    model.generation_config.eos_token_id = -1
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # sharper attention than a fresh initialisation has
    if attention is HIP:
        hip_hf.configure(model, **{**SPARSE, **settings})
    return model


def generate(model: PreTrainedModel, inputs: Inputs, **options: Any) -> torch.Tensor:
    """Logits of each new token, `[tokens, 1, vocab]`."""
    options |= dict(output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
    return torch.stack(out.logits)


@pytest.mark.parametrize("name", MODELS)
def test_generates_as_eager_does(name: str) -> None:
    """Logits of every step, where the budget covers everything; through the sparse code and
    pages."""
    inputs, model = MODELS[name][1](), make(name, HIP, budget=512)
    got, want = generate(model, inputs), generate(make(name, "eager"), inputs)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    assert [(row.path, row.cache) for row in hip_hf.explain(model)] == [("sparse", "pages")] * 2
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert not torch.allclose(generate(model, blank), got, atol=1e-2)  # the image matters


@pytest.mark.parametrize("name", MODELS)
def test_the_vision_part_is_untouched(name: str) -> None:
    """Its features are bit for bit those of the eager model, and `hip` is never called in it."""
    inputs, model, eager = MODELS[name][1](), make(name, HIP), make(name, "eager")
    given = {
        key: value for key, value in inputs.items() if key in ("pixel_values", "image_grid_thw")
    }
    with torch.no_grad():
        ours, theirs = (
            one.get_image_features(**given, return_dict=True).pooler_output
            for one in (model, eager)
        )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "hip"
    generate(model, inputs)
    called = {type(module).__name__ for module in model.modules() if "_hip_call" in module.__dict__}
    assert called == {type(model.model.language_model.layers[0].self_attn).__name__}


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_prunes_the_language_part(name: str) -> None:
    inputs, model = MODELS[name][1](), make(name, HIP)
    cache = HiPCache(model.config)
    pruned = generate(model, inputs, past_key_values=cache)
    rows = hip_hf.explain(model)
    assert [row.path for row in rows] == ["sparse"] * 2
    assert all(row.share < 0.6 for row in rows if row.share is not None)
    assert not torch.allclose(pruned[0], generate(make(name, "eager"), inputs)[0], atol=1e-4)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 9
