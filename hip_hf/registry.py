"""The methods by name: where each is, its options, and what it can do.

Modules of methods are imported when they are asked for, so that settings, which are below all methods, can look up names.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class NoOptions:
    """For methods without settings of their own."""


# method -> module that holds its `Selector`, or its `Attention`; `dense` reads everything and needs none
METHODS: dict[str, Any] = {
    "hip": "hip_hf.methods.hip",
    "staged": "hip_hf.methods.staged",
    "streaming": "hip_hf.methods.streaming",
    "quest": "hip_hf.methods.quest",
    "vertical_slash": "hip_hf.methods.vertical_slash",
    "sample": "hip_hf.methods.sample",
    "h2o": "hip_hf.methods.h2o",
    "oracle": "hip_hf.methods.oracle",
    "hyper": "hip_hf.methods.hyper",
    "dense": None,
}


_modules: dict[str, Any] = {}


def _module(method: str) -> Any:
    if method not in _modules:  # looked up, not imported again, where a graph is being compiled
        found = METHODS[method]
        _modules[method] = importlib.import_module(found) if isinstance(found, str) else found
    return _modules[method]


def add_method(name: str, selector: type, options: type = NoOptions) -> None:
    """Make a selection rule of your own known by `name`, to settings, models and measuring commands of this process.

    `selector`: a `hip_hf.methods.base.Selector`; with a method `cost(block, dim) -> (FLOPs, numbers loaded)` for one query
    block, `hip-hf fidelity` knows what it costs. `options`: a dataclass of its settings.

    Raises:
        ValueError: the name is taken.
    """
    if name in METHODS:
        raise ValueError(f"name: got {name!r}, allowed: a name that is not taken ({' | '.join(METHODS)})")
    METHODS[name] = _modules[name] = SimpleNamespace(Selector=selector, Options=options)


def options_type(method: str) -> type:
    """The dataclass of the method's own options."""
    return getattr(_module(method), "Options", NoOptions)


def selector_for(config: Any) -> Any:
    """The `Selector` of `config.method`, with its settings bound."""
    selector = getattr(_module(config.method), "Selector", None)
    if selector is None:
        raise ValueError(f"method {config.method!r} selects nothing")
    return selector(config)


def selects(method: str) -> bool:
    """Whether the method says which key blocks it reads."""
    return hasattr(_module(method), "Selector")


def summarises(config: Any) -> bool:
    """Whether the method of `config` keeps summaries of the keys, which decode without kept state must make anew."""
    return selects(config.method) and selector_for(config).make_pyramid(torch.float32) is not None


def extends(method: str) -> bool:
    """Whether the method works on keys that are not rotated: it compares those outside the window, and only with one another."""
    return method == "dense" or getattr(getattr(_module(method), "Selector", None), "extends", False)


def selected_keys(config: Any) -> int:
    """Keys that are selected for a query block at most: the budget, where the method spends it."""
    module = _module(config.method)
    if module is None:
        return 0
    own = getattr(module, "selected_keys", None)
    return config.budget if own is None else own(config)


def dense_reason(problem: Any, config: Any, layer: int | None, decoding: bool) -> tuple[str, bool]:
    """Why the method itself asks for dense attention, and whether for want of support; an empty string if it does not."""
    own = getattr(_module(config.method), "dense_reason", None)
    return ("", False) if own is None else own(problem, config, layer, decoding)


def sparse_reach(config: Any) -> int:
    """Keys that the sparse path reads for a row at most: a context up to this long it reads whole."""
    return config.sink + selected_keys(config) + config.window
