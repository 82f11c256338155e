"""Launches of the kernels that build the pyramid."""

from __future__ import annotations

import torch

from hip_hf.backends.triton.compile.launch import Launch, Pointer
from hip_hf.backends.triton.pyramid import summaries
from hip_hf.backends.triton.pyramid.pyramid import constants
from hip_hf.config import HiPConfig


def launches(dim: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """The kernels of the default settings, in prefill and in decode."""
    config = HiPConfig()
    pointers = dict.fromkeys(("table", "k"), Pointer(dtype)) | {"states": Pointer(torch.float32)}
    pointers |= dict.fromkeys(("built", "block_table", "sequences"), Pointer(torch.int32))
    strides = ("sequence", "head", "state_sequence", "state_head", "kb", "kh", "kt", "table")
    numbers = {f"stride_{name}": 1024 * dim for name in strides} | dict(
        stride_field=1, window=config.window, weight=0.5
    )
    found = []
    for step, kernel, flags in (
        ("tiles", summaries.tiles_kernel, dict(PAGE_SIZE=0)),
        ("append", summaries.append_kernel, dict(PAGE_SIZE=256, BUILD=True)),
        ("merge", summaries.append_kernel, dict(PAGE_SIZE=0, BUILD=False)),
    ):
        append = bool(flags.get("BUILD", False))
        fixed = constants(config, dim, 1 if append else config.block_q, append)
        found.append(
            Launch(
                f"pyramid, {config.representative}, {step}",
                kernel,
                {**pointers, **numbers, **fixed, **flags},
            )
        )
    return found
