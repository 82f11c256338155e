"""What the tests ask of a patched model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hip_hf.integration import patched_forward as forward


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor], **fields: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **fields).logits


def forwards(model: PreTrainedModel) -> list[Any]:
    return [m.__dict__.get("forward") for m in model.modules()]


def attention(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if forward.patched(module) is not None]
