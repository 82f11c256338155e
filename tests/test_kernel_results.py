"""The published results of `hip-hf kernels`: of every kernel on every target, without a problem, and as documented."""

from __future__ import annotations

import json
from typing import Any

from test_kernels_compile import ROOT, process

# What the command compiles unless it is asked for less.
DIMS, DTYPES = [64, 128, 256], ["bf16", "fp16"]

LAUNCHES = """
import json, sys
from hip_hf.eval.kernels import DTYPES, TARGETS
from hip_hf.kernels.budget import launches_of
dims, dtypes = json.loads(sys.argv[1])
found = []
for target in TARGETS:
    for dim in dims:
        for dtype in dtypes:
            for launch in launches_of(dim, DTYPES[dtype], target):
                warps = launch.arguments.get("num_warps", 4)
                found.append([launch.name, target, dim, str(DTYPES[dtype]).removeprefix("torch."), warps])
print(json.dumps(found))
"""


def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    return found


def test_published_results_are_of_every_kernel_on_every_target() -> None:
    """Of each launch of today's table and its warps. Whether the sources are still those, the command says."""
    document = published()
    assert next(iter(document)) == "command"
    assert (document["only"], document["dims"], document["dtypes"]) == ("", DIMS, DTYPES)
    done = process("-c", LAUNCHES, json.dumps([DIMS, DTYPES]))
    assert done.returncode == 0, done.stderr
    wanted = [tuple(cell) for cell in json.loads(done.stdout)]
    found = [tuple(row[name] for name in ("kernel", "target", "dim", "dtype", "warps")) for row in document["rows"]]
    assert len(wanted) > 1000
    assert sorted(found) == sorted(wanted)


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
