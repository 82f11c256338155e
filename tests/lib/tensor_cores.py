"""The arithmetic of NVIDIA's tensor cores in fp32: what the kernels do there, for the interpreter
and for plain PyTorch.

TF32 has 11 significant bits. Triton's `tf32x3` splits fp32 operands into a TF32 number and what is
left of it, and sums three products of these, the fourth, of both remainders, being dropped: 2^-22
of a product. The matrix units add four products at a time to a running sum that they cut off, not
round, to fp32. Exponentials (`ex2.approx`), and a softcap's tanh, which is made of them, have 22
bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import Builder, TensorHandle
from torch.utils._python_dispatch import TorchDispatchMode

from hip_hf.backends.triton.common.tuning import FULL_PRECISION

BITS_OF_TF32 = 11
BITS_OF_BF16 = 8
BITS_OF_EXPONENTIALS = 22
# Products that the matrix units add at once; newer ones take more, which is more exact.
AT_ONCE = 4

aten = torch.ops.aten


def cut(x: np.ndarray, bits: int) -> np.ndarray:
    """fp32 with `bits` significant bits, toward zero."""
    kept = np.uint32((-1 << 24 - bits) & 0xFFFFFFFF)
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) & kept).view(np.float32)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """fp32 with `bits` significant bits, to the nearest."""
    half = np.uint32(1 << 23 - bits)
    return cut(
        (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) + half).view(np.float32), bits
    )


def _add(acc: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """acc + a @ b by the matrix units; operands are taken as they are."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    total, beyond_fp32 = acc.astype(np.float64), np.int64((1 << 52 - 23) - 1)
    for i in range(0, a.shape[-1], AT_ONCE):
        total += a[..., i : i + AT_ONCE] @ b[..., i : i + AT_ONCE, :]
        bits = total.view(np.int64)
        bits &= ~beyond_fp32
    return total.astype(np.float32)


def product(a: np.ndarray, b: np.ndarray, terms: int = 3, bits: int = BITS_OF_TF32) -> np.ndarray:
    """fp32 a @ b from `terms` (1 or 3) products of numbers with `bits` significant bits."""
    nothing = np.zeros(
        (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), np.float32
    )
    if terms == 1:
        return _add(nothing, cut(a, bits), cut(b, bits))
    a_high, b_high = rounded(a, bits), rounded(b, bits)
    small = _add(_add(nothing, cut(a - a_high, bits), b_high), a_high, cut(b - b_high, bits))
    return _add(small, a_high, b_high)


class Reordered(TorchDispatchMode):
    """Plain PyTorch, forward and backward, with the terms of each product summed in a random order;
    seed None: as they come."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.random = None if seed is None else torch.Generator().manual_seed(seed)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def _reordered(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.random is None:
            return self.product(a, b)
        order = torch.randperm(a.shape[-1], generator=self.random)
        return self.product(a[..., order], b[..., order, :])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket
        if name in (aten.mm, aten.bmm):
            found = self._reordered(*args)
        elif name in (aten.addmm, aten.baddbmm, aten.baddbmm_, aten.addmm_):
            found = kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * self._reordered(
                *args[1:]
            )
        else:
            assert name not in (aten.mv, aten.dot, aten.addmv), (
                f"{name}: a product that is made in the usual way"
            )
            return func(*args, **kwargs)
        into = args[0] if name in (aten.baddbmm_, aten.addmm_) else kwargs.get("out")
        return found if into is None else into.copy_(found)


class TensorCores(Reordered):
    """Plain PyTorch's fp32 products are made as `product` does, and exponentials have 22 bits.

    As the kernels do, it makes a product over the head dim (one of `dims`) in one go, others a tile
    of keys or rows at a time.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        terms: int = 3,
        bits: int = BITS_OF_TF32,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        self.dims, self.terms, self.bits = dims, terms, bits
        self.count = 0  # products made

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        step = a.shape[-1] if a.shape[-1] in self.dims else FULL_PRECISION.keys
        x, y = a.detach().numpy(), b.detach().numpy()
        found = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for i in range(0, a.shape[-1], step):
            found += product(x[..., i : i + step], y[..., i : i + step, :], self.terms, self.bits)
        self.count += 1
        return torch.from_numpy(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if not tensors or tensors[0].dtype != torch.float32:
            return func(*args, **kwargs)
        if func.overloadpacket in (aten.exp, aten.exp_, aten.tanh, aten.tanh_, aten._softmax):
            exact = func(*args, **kwargs)
            return exact.copy_(
                torch.from_numpy(rounded(exact.detach().numpy(), BITS_OF_EXPONENTIALS))
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


class Emulation:
    """Makes the interpreter compute fp32 as an NVIDIA GPU does."""

    active = False

    @classmethod
    def start(cls, monkeypatch: pytest.MonkeyPatch) -> None:
        """Until the end of the test."""
        dot = Builder.create_dot

        def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
            if a.data.dtype != np.float32 or precision.name == "IEEE":
                return dot(self, a, b, acc, precision, *rest)
            terms = {"TF32": 1, "TF32x3": 3}[precision.name]
            return TensorHandle(acc.data + product(a.data, b.data, terms), acc.dtype)

        def coarse(exact: Any) -> Any:
            def made(self: Any, x: Any) -> Any:
                handle = exact(self, x)
                if handle.data.dtype == np.float32:
                    handle = TensorHandle(rounded(handle.data, BITS_OF_EXPONENTIALS), handle.dtype)
                return handle

            return made

        monkeypatch.setattr(cls, "active", True)
        monkeypatch.setattr(Builder, "create_dot", create_dot)
        for name in ("create_exp2", "create_exp"):
            monkeypatch.setattr(Builder, name, coarse(getattr(Builder, name)))


class Plugin:
    """Runs each test so."""

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            Emulation.start(patch)
            return (yield)
