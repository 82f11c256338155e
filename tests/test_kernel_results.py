"""The published results of `hip-hf kernels`: of every kernel on every target, without a problem, and as documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from test_kernels_compile import ROOT, process

from hip_hf.kernels.compiled import code_digest

# What was compiled and published: not yet all that the command compiles unless it is asked for less (docs/performance.md).
TARGETS, DIMS, DTYPES = ["sm80", "sm90", "gfx942"], [64, 128], ["bf16"]

LAUNCHES = """
import json, sys
from hip_hf.eval.kernels import DTYPES
from hip_hf.kernels.budget import launches_of
from hip_hf.kernels.compiled import code_digest
targets, dims, dtypes = json.loads(sys.argv[1])
found = []
for target in targets:
    for dim in dims:
        for dtype in dtypes:
            for launch in launches_of(dim, DTYPES[dtype], target):
                found.append([launch.name, target, dim, str(DTYPES[dtype]).removeprefix("torch."), launch.digest()])
print(json.dumps({"code": code_digest(), "launches": found}))
"""


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    return found


def test_published_results_are_of_every_kernel_on_every_target() -> None:
    """Of each launch of today's table with what the compiler is given, and of today's code."""
    document = published()
    assert next(iter(document)) == "command"
    assert (document["only"], document["targets"], document["dims"], document["dtypes"]) == ("", TARGETS, DIMS, DTYPES)
    done = process("-c", LAUNCHES, json.dumps([TARGETS, DIMS, DTYPES]))
    assert done.returncode == 0, done.stderr
    today = json.loads(done.stdout)
    wanted = [tuple(cell) for cell in today["launches"]]
    found = [tuple(row[name] for name in ("kernel", "target", "dim", "dtype", "launch")) for row in document["rows"]]
    assert len(wanted) > 200
    assert sorted(found) == sorted(wanted), "run `hip-hf kernels --output` again, then benchmarks/kernel_table.py"
    assert document["code"] == today["code"], "run `hip-hf kernels --output` again, then benchmarks/kernel_table.py"


def test_the_digest_is_of_code_alone(tmp_path: Path) -> None:
    """A changed line or constant of a kernel makes another; comments, docstrings and code around the kernels do not."""

    def digest(line: str = "return x + WIDE", constant: str = "16", said: str = "Doc.", around: str = "1") -> str:
        kernel = f'@triton.jit(do_not_specialize=[])\ndef one(x):\n    """{said}"""\n    {line}  # {said}\n'
        (tmp_path / "one.py").write_text(f"WIDE = tl.constexpr({constant})\n{kernel}\ndef launch():\n    return {around}\n")
        return code_digest(tmp_path)

    assert digest() == digest(said="Another.") == digest(around="2")
    assert len({digest(), digest(line="return x - WIDE"), digest(constant="32")}) == 3


def test_published_results_have_no_problem() -> None:
    document = published()
    assert document["failed"] == 0
    assert [row for row in document["rows"] if row["problem"] or row["spilled"] or not row["registers"]] == []
    # prompts and gradients are fast only with these
    fast = {"sm90": "wgmma", "gfx942": "mfma"}
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
