"""Kernel tests without a GPU: Triton's interpreter, made right for bf16 and quicker.

The interpreter keeps bf16 as uint16 and computes on the raw bits; here every operation lifts it to
fp32 and rounds the result to nearest even, as hardware does. Integers of 32 bits and fewer that
wrap raise an error. `DEVICE` is where the kernel tests run: natively where there is a GPU, else
interpreted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TensorHandle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def lift(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def lower(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def is_bf16(handle: Any) -> bool:
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def lifted(handle: Any) -> np.ndarray:
    return lift(handle.data) if is_bf16(handle) else handle.data


Lines = tuple[tuple[CodeType, int], ...]


def lines() -> Lines:
    """Where the interpreter is in a kernel: functions and their lines, from the inside out."""
    code = {function.__code__ for function in interpreter.InterpretedFunction.rewritten_fn.values()}
    found, frame = [], sys._getframe()
    while frame is not None:
        if frame.f_code in code:
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def described(at: Lines, program: tuple[int, ...]) -> str:
    """For reports: which program of which kernel, and its lines from the inside out."""
    calls = " < ".join(f"{Path(code.co_filename).name}:{line} {code.co_name}" for code, line in at)
    return f"program {program} of {at[-1][0].co_name if at else 'a kernel'}, {calls}"


def _whole(narrow: np.ndarray, left: np.ndarray, right: np.ndarray, op: Any) -> None:
    """Triton's own check of this takes many more operations, and does not say where it was."""
    if (narrow != op(left.astype(np.int64), right.astype(np.int64))).any():
        at = described(lines(), interpreter.interpreter_builder.grid_idx)
        of = f"{left.max()} and {right.max()}"
        raise OverflowError(f"{narrow.dtype} overflow: {op.__name__} of {of} at most wraps, {at}")


def _repair_operations() -> None:
    binary, unary, cast, dot, fma = (
        Builder.binary_op,
        Builder.unary_op,
        Builder.cast_impl,
        Builder.create_dot,
        Builder.create_fma,
    )

    def store(values: np.ndarray) -> Any:
        return TensorHandle(values if values.dtype == np.bool_ else lower(values), tl.bfloat16)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) or is_bf16(right)):
            found = binary(self, left, right, op)
            if (
                op in (np.add, np.subtract, np.multiply)
                and found.data.dtype.kind in "iu"
                and found.data.itemsize < 8
            ):
                _whole(found.data, left.data, right.data, op)
            return found
        with np.errstate(all="ignore"):
            return store(op(lifted(left), lifted(right)))

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return store(op(lifted(x))) if is_bf16(x) else unary(self, x, op)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        source, target = x.dtype.scalar, to.scalar
        if target == tl.bfloat16 and source in (tl.float32, tl.float16, tl.float64):
            return TensorHandle(lower(x.data), target)
        if source == tl.bfloat16 and target in (tl.float32, tl.float16, tl.float64):
            wide = TensorHandle(lift(x.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, to)
        return cast(self, x, to)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        # fp16 as well: numpy multiplies it in a slow loop
        wide = [
            TensorHandle(lifted(x).astype(np.float32), tl.float32) if x.data.itemsize == 2 else x
            for x in (a, b)
        ]
        return dot(self, *wide, acc, *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return store(lifted(x) * lifted(y) + lifted(z)) if is_bf16(z) else fma(self, x, y, z)

    Builder.binary_op, Builder.unary_op, Builder.cast_impl = binary_op, unary_op, cast_impl
    Builder.create_dot, Builder.create_fma = create_dot, create_fma


def _refuse_bf16(kind: Any, name: str) -> None:
    """Reductions and scans of bf16 would compare raw bits; our kernels reduce in fp32, and the
    tests hold them to it."""
    apply = kind.apply

    def checked(self: Any, x: Any) -> Any:
        parts = x if isinstance(x, tuple) else (x,)
        assert all(part.dtype.scalar != tl.bfloat16 for part in parts), (
            f"{name} of bfloat16: cast to float32 first"
        )
        return apply(self, x)

    kind.apply = checked


def _repair_index() -> None:
    """Triton 3.6 with numpy >= 2.4: `range(loaded)` wants an int and gets an array of one."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patched


def _copy_nothing() -> None:
    """Tensors are where they are interpreted; all of their storage would be copied onto itself
    after each launch."""
    interpreter.GridExecutor._init_args_hst = lambda self, args, named: (args, named)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def _patch_once() -> None:
    """Each call of a jit function from another patches `triton.language` anew, about 1 ms; once per
    launch is enough."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    done: list[set[frozenset[int]]] = []

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.pop()

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = frozenset(
            id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core
        )
        if not done or scope not in done[-1]:
            patch(self.fn)
            if done:
                done[-1].add(scope)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


if DEVICE == "cpu":
    _repair_operations()
    _refuse_bf16(interpreter.ReduceOps, "reduction")
    _refuse_bf16(interpreter.ScanOps, "scan")
    _repair_index()
    _copy_nothing()
    _patch_once()
    for option, value in (
        ("debug", True),
        ("sanitize_overflow", False),
    ):  # `device_assert` holds; for overflow see above
        object.__setattr__(interpreter.interpreter_builder.options, option, value)
