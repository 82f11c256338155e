"""Hierarchically pruned attention (HiP) for Hugging Face Transformers: long context by one flag, without retraining.

    import hip_hf
    model = AutoModelForCausalLM.from_pretrained("any/checkpoint", attn_implementation="hip")
"""

from hip_hf.attention import hip_attention
from hip_hf.config import HiPConfig
from hip_hf.state import DecodeState

__all__ = ["DecodeState", "HiPConfig", "hip_attention"]
