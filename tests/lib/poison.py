"""Fresh memory that shows itself: what is read before it is written is NaN, or a number that no
length, index or offset is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch

# A kernel that follows it as an index leaves every tensor of a test far behind, and sums of a few
# of them do not wrap.
FAR = 2**24


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, filled with NaN or, where it holds int32 or int64, with `FAR`."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(FAR) if tensor.dtype in (torch.int32, torch.int64) else tensor


def _spoilt(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        return spoil(make(*args, **kwargs))

    return made


def spoil_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, tensors that are made without contents are spoilt."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _spoilt(getattr(owner, name)))
