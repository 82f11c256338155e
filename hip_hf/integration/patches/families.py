"""Which families of models have a patcher: the table."""

from __future__ import annotations

from hip_hf.integration.patches import llama, mistral, qwen
from hip_hf.integration.patches.base import Patcher

# by model type
_FAMILIES: dict[str, Patcher] = {**llama.PATCHERS, **mistral.PATCHERS, **qwen.PATCHERS}


def families() -> list[str]:
    """Model types that have a patcher."""
    return list(_FAMILIES)


def patcher_for(model_type: str) -> Patcher | None:
    """The patcher of a family, None if it has none."""
    return _FAMILIES.get(model_type)


def add_patcher(model_type: str, patcher: Patcher) -> None:
    """Make a patcher of your own known, for this process (docs/patchers.md).

    Raises:
        ValueError: the family has one.
    """
    if model_type in _FAMILIES:
        raise ValueError(
            f"model_type: got {model_type!r}, allowed: one without a patcher ({' | '.join(_FAMILIES)} have one)"
        )
    _FAMILIES[model_type] = patcher
