"""Hierarchically pruned attention (HiP) for Hugging Face Transformers: long context by one flag,
without retraining.

import hip_hf
model = AutoModelForCausalLM.from_pretrained("any/checkpoint", attn_implementation="hip")
"""

from hip_hf import versions  # noqa: F401  first: it refuses a Transformers that is too old
from hip_hf.attention import hip_attention
from hip_hf.config import HiPConfig
from hip_hf.integration.api import configure, patch, register, unpatch, unregister
from hip_hf.integration.explain import explain
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.state import DecodeState
from hip_hf.versions import __version__ as __version__

__all__ = [
    "DecodeState",
    "HiPCache",
    "HiPConfig",
    "configure",
    "explain",
    "hip_attention",
    "patch",
    "register",
    "unpatch",
    "unregister",
]

register()
