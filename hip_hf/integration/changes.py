"""What is changed in Transformers, noted so that `hip_hf.unregister` can take it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial, wraps
from typing import Any

# The module that Python imports when it starts, after `hip-hf autoload enable`.
AUTOLOAD = "hip_hf_autoload"
_MISSING = object()
_undo: list[Callable[[], object]] = []


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a class or module of Transformers or lm-eval, until `undo`."""
    # as it stands there: a class method would come bound from `getattr`
    _set(vars(owner), partial(setattr, owner), partial(delattr, owner), name, value)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around` called in place of a function or method of Transformers or lm-eval, until
    `undo`, with the original before the arguments. Harmless where that is so already."""
    original = getattr(owner, name)
    if getattr(original, "_hip_around", None) is around:
        return

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped._hip_around = around  # type: ignore[attr-defined]
    set_attribute(owner, name, wrapped)


def set_item(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set an item of a table of Transformers', until `undo`."""
    _set(mapping, mapping.__setitem__, mapping.__delitem__, key, value)


def _set(now: Mapping[str, Any], put: Any, remove: Any, name: str, value: Any) -> None:
    before = now.get(name, _MISSING)

    def back() -> None:
        if now.get(name) is value:  # else it has been wrapped since, and is still called
            remove(name) if before is _MISSING else put(name, before)

    put(name, value)
    _undo.append(back)


def at_undo(back: Callable[[], object]) -> None:
    """Have `undo` call `back`."""
    _undo.append(back)


def undo() -> None:
    """Take all changes back, the latest first, but for what something else has replaced since.
    Finders of autoload, which wait for an import that would make some, are removed."""
    while _undo:
        _undo.pop()()
    sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != AUTOLOAD]
