"""Names for the code that Triton compiles: where they are the same, results of compiling it still
hold."""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import textwrap
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl


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
