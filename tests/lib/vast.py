"""Tensors of real sizes: what a million tokens of sixteen sequences need. Only what is touched of
them takes memory."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes from which on a tensor is mapped instead of allocated, and not filled.
LARGE = 2**26

aten = torch.ops.aten
FRESH = (aten.empty, aten.empty_like, aten.new_empty)
FILLED = (aten.zeros, aten.zeros_like, aten.randn, aten.randint)


def zeros(count: int, dtype: Any) -> np.ndarray:
    """So many numbers, which are 0 until they are written."""
    size = count * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.zeros(count, dtype)
    file = os.memfd_create("vast")  # of nothing but holes
    try:
        os.truncate(file, size)
        return np.frombuffer(mmap.mmap(file, size), dtype)
    finally:
        os.close(file)  # the mapping keeps it


class Vast(TorchDispatchMode):
    """While it is entered, fresh memory is zeros; large tensors are mapped, of random numbers as
    well, which are zeros, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in (*FRESH, *FILLED):
            return func(*args, **kwargs)
        shaped = func(*args, **{**kwargs, "device": "meta"})
        size = shaped.numel() * shaped.element_size()
        if size >= LARGE:
            return (
                torch.from_numpy(zeros(size, np.uint8))
                .view(shaped.dtype)
                .as_strided(shaped.shape, shaped.stride())
            )
        found = func(*args, **kwargs)
        return found.zero_() if func.overloadpacket in FRESH else found
