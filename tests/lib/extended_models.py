"""Models whose context is extended beyond the length that they say they were trained with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import _BASE, SPARSE
from patched import attention
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import hip_hf
from hip_hf.integration import patched_forward as forward

TRAINED = 128


def turning_back(model: PreTrainedModel) -> None:
    """A model of a patched family, extended as those without a patcher are."""
    for module in model.modules():
        forward.unpatch_layer(module)
    assert not attention(model)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


SMALL = {**_BASE, "max_position_embeddings": TRAINED}


def build(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A tiny model of a config of these tests, with the same weights at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    model.set_attn_implementation("hip")
    model.generation_config.eos_token_id = -1
    hip_hf.configure(model, **{**SPARSE, **settings})
    return model
