"""The published results of `hip-hf kernels`: of every kernel on every target, without a problem, and as documented."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_kernels_compile import ROOT, process

from hip_hf.backends.triton.compile.digest import code_digest

# What was compiled and published: not yet all that the command compiles unless it is asked for less (docs/performance.md).
TARGETS, DIMS, DTYPES = ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942"], [64, 128], ["bf16"]

LAUNCHES = """
import json, sys
from hip_hf.eval.measure.kernels import COMPILED_DTYPES
from hip_hf.backends.triton.compile.catalogue import launches_of
targets, dims, dtypes = json.loads(sys.argv[1])
found = []
for target in targets:
    for dim in dims:
        for dtype in dtypes:
            for launch in launches_of(dim, COMPILED_DTYPES[dtype], target):
                kind = str(COMPILED_DTYPES[dtype]).removeprefix("torch.")
                found.append([launch.name, target, dim, kind, launch.code(), launch.digest()])
print(json.dumps(found))
"""


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    return found


def test_published_results_are_of_every_kernel_on_every_target() -> None:
    """Of each launch of today's table with what the compiler is given, and of today's code of its kernel."""
    document = published()
    assert next(iter(document)) == "command"
    assert (document["only"], document["targets"], document["dims"], document["dtypes"]) == ("", TARGETS, DIMS, DTYPES)
    done = process("-c", LAUNCHES, json.dumps([TARGETS, DIMS, DTYPES]))
    assert done.returncode == 0, done.stderr
    wanted = [tuple(cell) for cell in json.loads(done.stdout)]
    found = [tuple(row[name] for name in ("kernel", "target", "dim", "dtype", "code", "launch")) for row in document["rows"]]
    assert len(wanted) > 500
    assert sorted(found) == sorted(wanted), "run `hip-hf kernels --output` again, then benchmarks/kernel_table.py"


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
    text = dict(constant="16", name="x", said="Doc.", line="{name} + WIDE * N", local="found") | changed
    file.write_text(CODE.format(**text | {"line": text["line"].format(name=text["name"])}))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return code_digest(module.outer)


def test_the_digest_of_a_kernel_is_of_the_code_that_it_uses(tmp_path: Path) -> None:
    """A changed line or constant, also of a function that it calls, makes another; comments, docstrings and names do not."""
    same = [dict(), dict(said="Another."), dict(name="value"), dict(local="other")]
    names = {digest_of(tmp_path / f"same{number}.py", **changed) for number, changed in enumerate(same)}
    assert len(names) == 1
    others = [dict(constant="32"), dict(line="{name} - WIDE * N"), dict(line="N + WIDE * {name}")]
    others_names = [digest_of(tmp_path / f"other{number}.py", **changed) for number, changed in enumerate(others)]
    assert len({*names, *others_names}) == 4


def test_results_of_the_same_code_are_kept(tmp_path: Path) -> None:
    """With the same Triton, and where nothing was wrong with them."""
    from hip_hf.eval.measure.kernels import compiled_before

    names = ("kernel", "target", "dim", "dtype", "code", "launch")
    row = dict(kernel="a", target="sm90", dim=64, dtype="bfloat16", code="c", launch="l", problem="")
    file = tmp_path / "kernels.json"
    assert compiled_before(file, "3") == {}
    file.write_text(json.dumps({"triton": "3", "rows": [row, {**row, "launch": "m", "problem": "spills"}]}))
    assert compiled_before(file, "3") == {tuple(row[name] for name in names): row}
    assert compiled_before(file, "4") == {}


@pytest.mark.parametrize(
    "content", [b"", b'{"rows": [', b"\xff", b"[]", b'{"triton": "3"}', b'{"triton": "3", "rows": [{"kernel": "a"}]}']
)
def test_an_output_that_is_no_result_of_kernels_is_refused(content: bytes, tmp_path: Path) -> None:
    from hip_hf.eval.measure.kernels import compiled_before

    file = tmp_path / "kernels.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"--output: got '.*kernels.json', which is no result of this command, allowed: "):
        compiled_before(file, "3")


def test_published_results_have_no_problem() -> None:
    document = published()
    assert document["failed"] == 0
    assert [row for row in document["rows"] if row["problem"] or row["spilled"] or not row["registers"]] == []
    # prompts and gradients are fast only with these
    fast = {"sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
    heavy = [row for row in document["rows"] if row["kernel"].startswith(("prefill", "dense rows", "backward"))]
    assert {row["target"] for row in heavy} >= fast.keys()
    assert [row for row in heavy if row["path"] != fast.get(row["target"], "mma.sync")] == []


def test_the_documented_table_is_what_the_command_prints() -> None:
    done = process("benchmarks/kernel_table.py")
    assert done.returncode == 0, done.stderr
    for kernel in ("select, prefill", "select, decode", "prefill", "decode", "backward, queries", "delta, step"):
        assert f"| {kernel} |" in done.stdout
    text = (ROOT / "docs" / "performance.md").read_text()
    assert done.stdout in text
    count = len(published()["rows"])
    assert f"all {count:,} launches fit" in text
