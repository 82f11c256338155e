"""The names under which this package's attention is registered with Transformers."""

from __future__ import annotations

from typing import Any

# Registered names, and the method each of them forces (None: the one in the settings).
NAMES = {"hip": None, "streaming": "streaming", "hyper": "hyper"}


def is_ours(name: Any) -> bool:
    """Whether it is one of the registered names."""
    return isinstance(name, str) and name in NAMES


def attends_by_us(config: Any) -> bool:
    """Whether a model with this text config attends by one of the registered names."""
    return is_ours(getattr(config, "_attn_implementation", None))
