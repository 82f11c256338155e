"""How kernels call one another: their many arguments are given by place, so that what is swapped
must be seen."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from repository import ROOT

pytestmark = pytest.mark.fast

KERNELS = ROOT / "hip_hf" / "backends" / "triton"


def jit_functions(sources: list[str]) -> dict[str, ast.FunctionDef]:
    """The functions that Triton compiles, by name."""
    functions = [
        node
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    ]
    return {
        node.name: node
        for node in functions
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def names_in(node: ast.AST) -> set[str]:
    """The names that an expression is made of."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def swapped(functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """Arguments of inner calls whose name is that of another parameter of the function called,
    unless that parameter is made of it as well."""
    for caller in functions.values():
        for call in ast.walk(caller):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            if (called := functions.get(call.func.id)) is None:
                continue
            given = dict(zip([arg.arg for arg in called.args.args], call.args, strict=False))
            for parameter, argument in given.items():
                if not isinstance(argument, ast.Name) or argument.id == parameter:
                    continue
                own = given.get(argument.id)
                if own is not None and argument.id not in names_in(own):
                    yield f"{caller.name}: {called.name}({parameter}={argument.id})"


def test_arguments_stand_in_the_places_of_their_names() -> None:
    functions = jit_functions(
        [file.read_text(encoding="utf-8") for file in sorted(KERNELS.rglob("*.py"))]
    )
    assert len(functions) > 60
    assert list(swapped(functions)) == []


def test_what_is_swapped_is_seen() -> None:
    source = """
@triton.jit
def inner(first, last, BLOCK: tl.constexpr, keys):
    return first + last

@triton.jit
def outer(first, last, keys, BLOCK: tl.constexpr):
    return inner({}, BLOCK, {})
"""
    assert list(swapped(jit_functions([source.format("first, last", "keys")]))) == []
    assert list(swapped(jit_functions([source.format("first, last", "BLOCK")]))) == []
    assert list(swapped(jit_functions([source.format("last, first", "keys")]))) == [
        "outer: inner(first=last)",
        "outer: inner(last=first)",
    ]
