"""Calls that the kernels and the torch backend must answer alike: same blocks, same output."""

from __future__ import annotations

from functools import partial
from typing import Any

import kernel_cases
import torch
from helpers import small

from hip_hf.attention import Result

# In fp32 both backends find the same blocks; what is left is the order of sums (on a GPU, of the
# exponential as well).
NEAR = 2e-5
# The selections are compared as well.
call = partial(kernel_cases.call, need_mask=True)


def same(got: Result, want: Result) -> None:
    assert got.mask is not None
    assert want.mask is not None
    for name in ("counts", "first", "indices"):
        a, b = getattr(got.mask, name).cpu(), getattr(want.mask, name).cpu()
        assert torch.equal(a, b), f"{name}: {a[a != b]} is not {b[a != b]}"
    kernel_cases.assert_same(got, want, NEAR)


def both(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: dict[str, Any], **fields: Any
) -> None:
    got, want = (
        call(q, k, v, small(backend=backend, **config), **fields) for backend in ("triton", "torch")
    )
    same(got, want)
