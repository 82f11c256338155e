"""One compilation of a kernel, which `hip-hf kernels` makes for every GPU without having one and
`benchmarks/tune.py` times; and names for the code that Triton compiles: where they are the same,
results of compiling it still hold."""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import MockTensor


@dataclass(frozen=True)
class Launch:
    """One compilation: `kernel` (a `triton.jit` function) with `arguments` by name, as at its
    launch: tensors or `MockTensor`s, which are aligned to 16 bytes as those of torch's allocator;
    numbers as they are (divisibility by 16 is specialised), constexprs, `num_warps`, `num_stages`.

    `tensor_cores`: whether it must use matrix instructions. `grid`: where it can be launched as
    well.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    tensor_cores: bool = False
    grid: tuple[int, ...] | None = None

    def stand_ins(self) -> dict[str, Any]:
        """The arguments with `MockTensor`s for tensors."""
        return {
            name: MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x
            for name, x in self.arguments.items()
        }

    def given(self) -> dict[str, Any]:
        """What the compiler is given beside the code, in JSON's types: numbers, launch options, and
        of tensors the dtype. Arguments of the kernel by their place: their names do not count."""
        places = {name: str(place) for place, name in enumerate(self.kernel.arg_names)}
        return {
            places.get(name, name): x if isinstance(x, int | float | str) else str(x.dtype)
            for name, x in self.arguments.items()
        }

    def digest(self) -> str:
        """A name for what is `given`."""
        return name_of(json.dumps(self.given(), sort_keys=True))

    def code(self) -> str:
        """A name for the code. Where it is the same, and so is what is `given`, so is the
        program."""
        return code_digest(self.kernel)


def name_of(text: str) -> str:
    """A short name for a text of any length."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest(kernel: Any) -> str:
    """A name for the code of `kernel` (a `triton.jit` function), of all such functions that it
    calls and of the constants that they use. Comments, docstrings, names of local variables and
    parameters, and where functions lie do not count."""
    return _digest(kernel.fn)


@functools.cache
def _digest(function: FunctionType) -> str:
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    if ast.get_docstring(node) is not None:
        del node.body[0]
    node.name = "function"
    return name_of(ast.unparse(_Anonymous(function, node).visit(node)))


class _Anonymous(ast.NodeTransformer):
    """Puts numbers for the names of a function's parameters and local variables, and for other
    names what they stand for."""

    def __init__(self, function: FunctionType, node: ast.FunctionDef) -> None:
        self.known = {**vars(builtins), **function.__globals__}
        local = list(inspect.signature(function).parameters)
        names = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
        local += [name.id for name in names if isinstance(name.ctx, ast.Store)]
        self.numbers = {name: f"_{number}" for number, name in enumerate(dict.fromkeys(local))}

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self.numbers[node.arg]
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.numbers.get(node.id) or _meaning(self.known[node.id])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Arguments that are given by name to another function of a kernel count by their place."""
        called = getattr(self.known.get(getattr(node.func, "id", "")), "fn", None)
        if isinstance(called, FunctionType):
            places = list(inspect.signature(called).parameters)
            for keyword in node.keywords:
                keyword.arg = keyword.arg and f"_{places.index(keyword.arg)}"
        return self.generic_visit(node)


def _meaning(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(getattr(value, "fn", None), FunctionType):
        return _digest(value.fn)
    if isinstance(value, tl.constexpr):
        return repr(value.value)
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
