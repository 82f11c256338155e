"""Mistral: Llama's layer, with one sliding window for all layers (None in the newer models)."""

from __future__ import annotations

from typing import Any

from hip_hf.integration.patches.base import Patcher
from hip_hf.integration.patches.llama import project


def sliding_window(module: Any) -> int | None:
    """The model's, None if it has none."""
    return getattr(module.config, "sliding_window", None)


PATCHERS = {"mistral": Patcher("MistralAttention", project, sliding_window)}
