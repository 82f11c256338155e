"""Mistral: Llama's layer, with one sliding window for all layers (None in the newer models)."""

from __future__ import annotations

from hip_hf.patches.base import Patcher
from hip_hf.patches.llama import project

PATCHERS = {"mistral": Patcher("MistralAttention", project, lambda module: getattr(module.config, "sliding_window", None))}
