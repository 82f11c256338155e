"""How the tests lie: in folders by what they test, and what several of them use in `tests/lib`."""

from __future__ import annotations

import ast
import re

import pytest
from repository import LIB, ROOT

pytestmark = pytest.mark.fast

FILES = sorted((ROOT / "tests").rglob("*.py"))


def test_no_test_module_is_imported_by_another() -> None:
    """Nor by what they share."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            found += [f"{file.name}: {name}" for name in names if name.startswith("test_")]
    assert found == []


def test_every_test_module_lies_in_a_folder_and_has_a_name_of_its_own() -> None:
    """The folders are no packages, so that a module goes by its bare name."""
    tests = [file for file in FILES if file.name.startswith("test_")]
    assert len(tests) > 100
    assert [file.name for file in tests if file.parent in (LIB, ROOT / "tests")] == []
    assert len({file.name for file in tests}) == len(tests)


def test_every_folder_has_fast_tests() -> None:
    """Or `make test-fast` would not meet that part of the library."""
    tests = [file for file in FILES if file.name.startswith("test_")]
    marked = re.compile(r"\bpytest\.mark\.fast\b")
    fast = {file.parent for file in tests if marked.search(file.read_text(encoding="utf-8"))}
    assert fast == {file.parent for file in tests}


@pytest.mark.parametrize(
    "place",
    ["pyproject.toml", "tests/races.txt", "tests/versions/files.txt", "tests/versions/grid.txt"],
)
def test_every_test_that_a_list_names_is_there(place: str) -> None:
    """Pytest refuses a whole list for one name that has changed."""
    names = re.findall(r"tests/[\w/]+\.py(?:::\w+)?", (ROOT / place).read_text(encoding="utf-8"))
    assert len(names) > 5
    missing = []
    for name in names:
        path, _, test = name.partition("::")
        file = ROOT / path
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if not text or (test and f"def {test}(" not in text):
            missing.append(name)
    assert missing == []
