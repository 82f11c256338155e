"""Encoder-decoders whose decoder attends by `hip`: the tokens of eager attention, whatever cache
`generate` makes for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SPARSE
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import hip_hf
from hip_hf import HiPCache

_HEADS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 99}
_GEMMA = {
    **_HEADS,
    **_IDS,
    "vocab_size": 100,
    "head_dim": 16,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
}


def t5gemma() -> PreTrainedModel:
    return T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=_GEMMA, decoder=_GEMMA, vocab_size=100, **_IDS)
    )


def t5gemma2() -> PreTrainedModel:
    text = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens = {
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
        "mm_tokens_per_image": 4,
    }
    encoder = {
        "text_config": text,
        "vision_config": {**sizes, "image_size": 32, "patch_size": 8},
        **tokens,
    }
    return T5Gemma2ForConditionalGeneration(
        T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=90, **_IDS)
    )


def bart() -> PreTrainedModel:
    sides = {
        f"{side}_{name}": 2
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads")
    }
    dims = {
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=100, d_model=64, **sides, **dims, **_IDS)
    )


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("make", [t5gemma, t5gemma2, bart])
def test_tokens_equal_eager_attention(make: Any, cache: str | None) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # sharper attention, and tokens that depend on the prompt
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.3)
    model.generation_config.eos_token_id = -1
    given, begun = torch.randint(3, 89, (2, 30)), torch.randint(3, 89, (2, 60))
    mask = torch.ones_like(given)
    mask[1, :9] = 0  # the encoder's prompts are of different lengths
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=8, cache_implementation=cache)

    def generated() -> tuple[list[list[int]], Any]:
        batch = dict(input_ids=given, attention_mask=mask, decoder_input_ids=begun)
        with torch.no_grad():
            made = model.generate(**batch, return_dict_in_generate=True, **options)
        return made.sequences[:, begun.shape[1] :].tolist(), made.get(
            "cache", made.get("past_key_values")
        )

    model.set_attn_implementation("eager")
    expected, _ = generated()
    assert len(set(map(tuple, expected))) == 2
    model.set_attn_implementation("hip")
    hip_hf.configure(model, **{**SPARSE, "budget": 1024})
    tokens, kept = generated()
    assert tokens == expected
    assert type(kept.self_attention_cache) is (StaticCache if cache else HiPCache)
    if make is not t5gemma2:  # which attends to its own keys and the encoder's at once: dense
        assert "sparse" in {row.path for row in hip_hf.explain(model)}
