"""The committed results (`benchmarks/results`) are of today's code, and as the pages show them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import roofline
import tables
from processes import process
from repository import ROOT

from hip_hf.eval.measure import fidelity

DOCS = ROOT / "docs"

pytestmark = pytest.mark.fast

# What was compiled and published: not yet all that the command compiles unless it is asked for less
# (docs/performance.md).
TARGETS, DIMS, DTYPES = (
    ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942"],
    [64, 128],
    ["bf16"],
)

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


def committed(name: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_published_results_are_of_every_kernel_on_every_target() -> None:
    """Of each launch of today's table with what the compiler is given, and of today's code of its
    kernel."""
    document = committed("kernels")
    assert next(iter(document)) == "command"
    assert (document["only"], document["targets"], document["dims"], document["dtypes"]) == (
        "",
        TARGETS,
        DIMS,
        DTYPES,
    )
    done = process("-c", LAUNCHES, json.dumps([TARGETS, DIMS, DTYPES]))
    assert done.returncode == 0, done.stderr
    wanted = [tuple(cell) for cell in json.loads(done.stdout)]
    found = [
        tuple(row[name] for name in ("kernel", "target", "dim", "dtype", "code", "launch"))
        for row in document["rows"]
    ]
    assert len(wanted) > 500
    assert sorted(found) == sorted(wanted), (
        "run `hip-hf kernels --output` again, then benchmarks/kernel_table.py"
    )


def test_published_results_have_no_problem() -> None:
    document = committed("kernels")
    assert document["failed"] == 0
    assert [
        row for row in document["rows"] if row["problem"] or row["spilled"] or not row["registers"]
    ] == []
    # prompts and gradients are fast only with these
    fast = {"sm90": "wgmma", "sm100": "tcgen05", "gfx942": "mfma"}
    heavy = [
        row
        for row in document["rows"]
        if row["kernel"].startswith(("prefill", "dense rows", "backward"))
    ]
    assert {row["target"] for row in heavy} >= fast.keys()
    assert [row for row in heavy if row["path"] != fast.get(row["target"], "mma.sync")] == []


def test_the_documented_table_is_what_the_command_prints() -> None:
    done = process("benchmarks/kernel_table.py")
    assert done.returncode == 0, done.stderr
    for kernel in (
        "select, prefill",
        "select, decode",
        "prefill",
        "decode",
        "backward, queries",
        "delta, step",
    ):
        assert f"| {kernel} |" in done.stdout
    text = (ROOT / "docs" / "performance.md").read_text()
    assert done.stdout in text
    count = len(committed("kernels")["rows"])
    assert f"all {count:,} launches fit" in text


def test_the_table_in_the_documentation_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what was measured, where the results of a GPU are there."""
    monkeypatch.setattr("sys.argv", ["roofline"])
    roofline.main()
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page


@pytest.mark.parametrize("name", ["fidelity", "fidelity_stress"])
def test_committed_results_have_the_columns_of_the_code(name: str) -> None:
    rows = committed(name)["rows"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["settings"], row["keys"]), []).append(row)
    for whole, *layers in groups.values():
        again = fidelity.over_layers(layers)
        assert list(again) == list(whole)
        assert again == {
            key: pytest.approx(value) if isinstance(value, float) else value
            for key, value in whole.items()
        }


def test_pages_show_what_was_measured() -> None:
    """Each table of `docs/tables.py`, and one after the other: tables may have rows in common."""
    at = dict.fromkeys((page for page, _ in tables.TABLES), 0)
    for page, make in tables.TABLES:
        wanted, text = make(), (ROOT / page).read_text(encoding="utf-8")
        assert wanted.count("\n") > 3
        found = text.find(wanted, at[page])
        assert found >= 0, f"{page}: the table is not what `python docs/tables.py` prints\n{wanted}"
        at[page] = found + len(wanted)


def test_a_table_wants_all_of_its_rows() -> None:
    rows = committed("needles_delta")["rows"]
    with pytest.raises(ValueError, match="got 0 rows of 'paper'"):
        tables.named(rows, "paper")
    with pytest.raises(ValueError, match="got 4 rows of 'dense'"):
        tables.named(rows * 2, "dense")
    with pytest.raises(ValueError, match="several of the same"):
        tables.by_length(rows, "digits", "settings")
