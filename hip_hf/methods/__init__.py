"""Methods: rules that say which key blocks a query block reads. One small file each, listed here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NoOptions:
    """For methods without settings of their own."""


# method -> module that holds its `Selector`; `dense` reads everything and needs none
METHODS: dict[str, str | None] = {
    "hip": "hip_hf.methods.hip",
    "streaming": "hip_hf.methods.streaming",
    "oracle": "hip_hf.methods.oracle",
    "dense": None,
}


def options_type(method: str) -> type:
    """The dataclass of the method's own options."""
    return getattr(importlib.import_module(module), "Options", NoOptions) if (module := METHODS[method]) else NoOptions


def selector_for(config: Any) -> Any:
    """The `Selector` of `config.method`, with its settings bound."""
    module = METHODS[config.method]
    if module is None:
        raise ValueError(f"method {config.method!r} selects nothing")
    return importlib.import_module(module).Selector(config)
