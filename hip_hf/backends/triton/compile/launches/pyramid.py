"""Launches of the kernels that build the pyramid."""

from __future__ import annotations

from typing import Any

import torch

from hip_hf.backends.triton.compile.launch import Launch, Pointer
from hip_hf.backends.triton.pyramid.pyramid import pyramid_constants
from hip_hf.backends.triton.pyramid.summaries import append_kernel, tiles_kernel
from hip_hf.config import HiPConfig


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The kernels of the default settings, in prefill and in decode."""
    config = HiPConfig()
    given: dict[str, Any] = dict.fromkeys(("table", "k"), Pointer(dtype))
    given |= dict(states=Pointer(torch.float32))
    given |= dict.fromkeys(("built", "block_table", "sequences"), Pointer(torch.int32))
    strides = ("sequence", "head", "state_sequence", "state_head", "kb", "kh", "kt", "table")
    given |= {f"stride_{name}": 1024 * dim for name in strides}
    given |= dict(stride_field=1, window=config.window, weight=0.5)
    prompt = pyramid_constants(config, dim, config.block_q, append=False)
    step = pyramid_constants(config, dim, 1, append=True)
    return [
        Launch(f"pyramid, {config.representative}, {name}", kernel, given | fixed)
        for name, kernel, fixed in (
            ("tiles", tiles_kernel, prompt | dict(PAGE_SIZE=0)),
            ("append", append_kernel, step | dict(PAGE_SIZE=256, BUILD=True)),
            ("merge", append_kernel, prompt | dict(PAGE_SIZE=0, BUILD=False)),
        )
    ]
