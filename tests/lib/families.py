"""Tiny random models of the families that the integration tests run over."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
)

import hip_hf

VOCAB = 100
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 99,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_BASE),
    "mistral": MistralConfig(**_BASE, sliding_window=24),
    "mistral_full": MistralConfig(**_BASE, sliding_window=None),
    "qwen2": Qwen2Config(**_BASE),
    "qwen3": Qwen3Config(**_BASE),
    "gemma2": Gemma2Config(**_BASE, sliding_window=24, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**_BASE),
    "gpt_oss": GptOssConfig(**_BASE, sliding_window=24, num_local_experts=4, num_experts_per_tok=2),
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Families with a patcher, and Mistral with and without its sliding window.
PATCHED: dict[str, PreTrainedConfig] = {
    **{name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3")},
    "mistral_full": MistralConfig(**_BASE, sliding_window=None),
    # a window that no layer uses: without one, Transformers 5.23 cannot make masks from position
    # ids
    "qwen2_moe": Qwen2MoeConfig(
        **_BASE,
        **_EXPERTS,
        shared_expert_intermediate_size=32,
        use_sliding_window=True,
        max_window_layers=0,
    ),
    "qwen3_moe": Qwen3MoeConfig(**_BASE, **_EXPERTS),
}

# Sparse everywhere, with blocks small enough for short test sequences.
SPARSE = {
    "block_q": 16,
    "block_k": 8,
    "budget": 32,
    "sink": 8,
    "window": 16,
    "dense_layers": 0,
    "dense_below": 0,
    "dense_tail": 0,
}


def make_model(family: str, implementation: str = "hip", **settings: object) -> PreTrainedModel:
    """A model of the family with `SPARSE` settings, overridden by `settings`; the same weights at
    every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy({**FAMILIES, **PATCHED}[family])).eval()
    for parameter in model.parameters():
        # sharper attention than a fresh initialisation, so that what is selected matters
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = -1  # never generated: every run has its full length
    hip_hf.configure(model, **{**SPARSE, **settings})
    return model


IMAGE = 90  # the token of an image's patches


def make_llava(attention: Any) -> PreTrainedModel:
    """A tiny LLaVA; `attention`: of all parts, or by the name of each part's config."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_BASE), image_token_index=IMAGE
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)


def make_qwen2_vl(attention: Any) -> PreTrainedModel:
    """A tiny Qwen2-VL."""
    vision = dict(
        depth=2,
        embed_dim=32,
        hidden_size=64,
        num_heads=2,
        mlp_ratio=2,
        patch_size=4,
        spatial_merge_size=2,
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    ids = dict(
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
    )
    config = Qwen2VLConfig(
        text_config={**_BASE, "rope_parameters": rope}, vision_config=vision, **ids
    )
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention)


def make_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded random prompts."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, VOCAB - 1, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def paths(model: PreTrainedModel) -> list[str]:
    """The path each layer took in its last call."""
    return [row.path for row in hip_hf.explain(model)]
