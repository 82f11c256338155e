"""What `hip-hf kernels` keeps of earlier results, and by which digest of a kernel's code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hip_hf.backends.triton.compile.launch import code_digest

CODE = """
import triton
import triton.language as tl
WIDE = tl.constexpr({constant})

@triton.jit
def inner({name}, N):
    \"\"\"{said}\"\"\"
    return {line}  # {said}

@triton.jit
def outer({name}, OUT: tl.constexpr):
    {local} = inner({name} + 1, N=OUT)
    return {local}
"""


def digest_of(file: Path, **changed: str) -> str:
    text = (
        dict(constant="16", name="x", said="Doc.", line="{name} + WIDE * N", local="found")
        | changed
    )
    file.write_text(CODE.format(**text | {"line": text["line"].format(name=text["name"])}))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return code_digest(module.outer)


def test_the_digest_of_a_kernel_is_of_the_code_that_it_uses(tmp_path: Path) -> None:
    """A changed line or constant, also of a function that it calls, makes another; comments,
    docstrings and names do not."""
    same = [dict(), dict(said="Another."), dict(name="value"), dict(local="other")]
    names = {
        digest_of(tmp_path / f"same{number}.py", **changed) for number, changed in enumerate(same)
    }
    assert len(names) == 1
    others = [dict(constant="32"), dict(line="{name} - WIDE * N"), dict(line="N + WIDE * {name}")]
    others_names = [
        digest_of(tmp_path / f"other{number}.py", **changed)
        for number, changed in enumerate(others)
    ]
    assert len({*names, *others_names}) == 4


def test_results_of_the_same_code_are_kept(tmp_path: Path) -> None:
    """With the same Triton, and where nothing was wrong with them."""
    from hip_hf.eval.measure.kernels import compiled_before

    names = ("kernel", "target", "dim", "dtype", "code", "launch")
    row = dict(
        kernel="a", target="sm90", dim=64, dtype="bfloat16", code="c", launch="l", problem=""
    )
    file = tmp_path / "kernels.json"
    assert compiled_before(file, "3") == {}
    file.write_text(
        json.dumps({"triton": "3", "rows": [row, {**row, "launch": "m", "problem": "spills"}]})
    )
    assert compiled_before(file, "3") == {tuple(row[name] for name in names): row}
    assert compiled_before(file, "4") == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"rows": [',
        b"\xff",
        b"[]",
        b'{"triton": "3"}',
        b'{"triton": "3", "rows": [{"kernel": "a"}]}',
    ],
)
def test_an_output_that_is_no_result_of_kernels_is_refused(content: bytes, tmp_path: Path) -> None:
    from hip_hf.eval.measure.kernels import compiled_before

    file = tmp_path / "kernels.json"
    file.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"--output: got '.*kernels.json', which is no result of this command, allowed: ",
    ):
        compiled_before(file, "3")
