"""The table of methods, one line each: a name, and the module whose `METHOD` declares the method.

Modules are imported when they are asked for, so that settings, which are below all methods, can
look up names. `hip_hf.methods.base.Method` says what a declaration holds.
"""

from __future__ import annotations

import importlib

METHODS = {
    "hip": "hip_hf.methods.hip",
    "staged": "hip_hf.methods.staged",
    "streaming": "hip_hf.methods.streaming",
    "quest": "hip_hf.methods.quest",
    "vertical_slash": "hip_hf.methods.vertical_slash",
    "sample": "hip_hf.methods.sample",
    "h2o": "hip_hf.methods.h2o",
    "oracle": "hip_hf.methods.oracle",
    "hyper": "hip_hf.methods.hyper",
    "dense": "hip_hf.methods.dense",
}
_declared: dict[str, object] = {}


def declared(name: str) -> object:
    """The declaration of the method `name`, for `hip_hf.config` and
    `hip_hf.methods.base.method_of`, which say what they know of it.

    Raises:
        KeyError: there is no such method.
    """
    if name not in _declared:  # looked up, not imported again, where a graph is being compiled
        _declared[name] = importlib.import_module(METHODS[name]).METHOD
    return _declared[name]


def declare(name: str, module: str, method: object) -> None:
    """Put a method that `module` declares while the program runs into the table.

    Raises:
        ValueError: the name is taken.
    """
    if name in METHODS:
        taken = " | ".join(METHODS)
        raise ValueError(f"name: got {name!r}, allowed: a name that is not taken ({taken})")
    METHODS[name], _declared[name] = module, method
