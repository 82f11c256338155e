"""Every launch that users would meet, for `hip-hf kernels`, which compiles all of them for every
GPU without having one.

Each module of `launches` has a function `launches(dim, dtype, target)`: the `Launch`es with that
head dim and dtype on a target, one of "sm80", ..., "sm120", "gfx942", because launch configurations
may depend on it. The code that launches a kernel also makes the arguments that are compiled here.
"""

from __future__ import annotations

import torch

from hip_hf.backends.triton.compile.launch import Launch
from hip_hf.backends.triton.compile.launches import attention, selection

MODULES = (selection, attention)


def launches_of(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """All launches of all modules."""
    return [launch for module in MODULES for launch in module.launches(dim, dtype, target)]
