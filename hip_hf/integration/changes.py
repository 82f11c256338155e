"""What is changed in Transformers, noted as it is changed, so that `hip_hf.unregister` can take it back."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

_MISSING = object()
_undo: list[Callable[[], object]] = []


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a class or module of Transformers or lm-eval, until `undo`."""
    before = vars(owner).get(name, _MISSING)  # as it stands there: a class method would come bound from `getattr`

    def back() -> None:
        if vars(owner).get(name) is not value:  # somebody has wrapped ours, and still calls it
            return
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, value)
    _undo.append(back)


def set_item(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set an item of a table of Transformers', until `undo`."""
    before = mapping.get(key, _MISSING)

    def back() -> None:
        if mapping.get(key) is not value:
            return
        if before is _MISSING:
            del mapping[key]
        else:
            mapping[key] = before

    mapping[key] = value
    _undo.append(back)


def at_undo(back: Callable[[], object]) -> None:
    """Have `undo` call `back`."""
    _undo.append(back)


def undo() -> None:
    """Take all changes back, the latest first. What something else has replaced since stays as it is."""
    while _undo:
        _undo.pop()()
