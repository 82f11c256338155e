"""`benchmarks/gpu_run.py`: all of it on a CPU, and what happens to a step that fails, hangs, dies
or is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_records
import gpu_run
import pytest
import roofline
import torch
from repository import ROOT

from hip_hf.backends.triton.compile.catalogue import launches_of
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.gpu_shapes import NO_COST, KernelCost, Shape
from hip_hf.eval.reporting.resumable import Resumable
from hip_hf.methods import hyper

BENCHMARKS = ROOT / "benchmarks"
STEPS, Step = gpu_run.STEPS, gpu_run.Step

# What is installed here and not where a GPU is lent.
ABSENT = ("lm_eval", "matplotlib", "datasets", "gguf")
# A worker whose steps do what they are called.
WORKER = f"""
import os, sys, time
from pathlib import Path
sys.path[:0] = [{str(BENCHMARKS)!r}]
from gpu_run import serve
folder = Path(sys.argv[1])

def row(name, text):
    file = folder / (name + ".json.partial")
    first = "" if file.exists() else '{{"request": {{}}}}\\n'
    found = '["[0]", {{"rows": [{{"figure": 1, "wrong": "' + text + '"}}]}}]\\n'
    file.open("a").write(first + found)

def take(name):
    with (folder / "taken").open("a") as file:
        file.write(f"{{name}} {{os.getpid()}}\\n")
    row(name, "two and two are five" if name == "wrong" else "")
    if name == "slow":
        print("sleeping", flush=True)
        time.sleep(3600)
    if name == "dies":
        os.write(2, b"Illegal instruction\\n")
        os._exit(4)
    if name == "fails":
        raise ValueError("no such figure")
    if name == "in part":
        print("decode: OutOfMemoryError: full")
        return 1
    return 0

serve(folder, take)
"""


def take(
    folder: Path, names: Sequence[str], limit: float = 60.0, minutes: float = 5.0
) -> tuple[int, dict[str, Any]]:
    """Exit status of a run of such steps, and their records."""
    code = gpu_run.run(
        folder,
        [Step(name, limit) for name in names],
        [sys.executable, "-c", WORKER, str(folder)],
        minutes,
    )
    return code, {
        record["step"]: record
        for record in json.loads((folder / "summary.json").read_text())["steps"]
    }


def taken(folder: Path) -> list[tuple[str, str]]:
    """Steps that were begun, and by which process."""
    return [
        tuple(line.split())
        for line in (folder / "taken").read_text().replace("in part", "in_part").splitlines()
    ]


def test_a_step_that_fails_leaves_what_it_has_and_the_next_one_begins(tmp_path: Path) -> None:
    code, records = take(tmp_path, ("good", "fails", "dies", "in part", "next", "last"))
    assert code == gpu_records.MISSING
    found = {name: (record["state"], record["error"]) for name, record in records.items()}
    assert found == {
        "good": ("done", ""),
        "fails": ("failed", "ValueError: no such figure"),
        "dies": ("failed", "Illegal instruction"),
        "in part": ("failed", "decode: OutOfMemoryError: full"),
        "next": ("done", ""),
        "last": ("done", ""),
    }
    assert all(len(record["rows"]) == 1 and record["seconds"] > 0 for record in records.values())
    process = dict(taken(tmp_path))
    assert process["good"] == process["fails"]
    assert (
        len({process[name] for name in ("fails", "dies", "in_part", "next")}) == 4
    )  # a new one after each failure
    assert process["next"] == process["last"]
    text = (tmp_path / "summary.md").read_text()
    assert "| fails | failed |" in text
    assert text.count("| figure | wrong |") == 6


def test_a_step_over_its_time_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    code, records = take(tmp_path, ("slow", "last"), limit=5.0)
    assert code == gpu_records.MISSING
    assert (records["slow"]["state"], records["slow"]["error"]) == (
        "out of time",
        "stopped after 5 s",
    )
    assert len(records["slow"]["rows"]) == 1
    assert records["last"]["state"] == "done"
    (pid,) = [int(pid) for name, pid in taken(tmp_path) if name == "slow"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_same_command_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    take(tmp_path, ("good", "fails"))
    code, records = take(tmp_path, ("good", "fails", "last"))
    assert code == gpu_records.MISSING
    assert [name for name, _ in taken(tmp_path)] == ["good", "fails", "fails", "last"]
    assert {name: len(record["rows"]) for name, record in records.items()} == {
        "good": 1,
        "fails": 2,
        "last": 1,
    }
    assert take(tmp_path, ("good", "last"))[0] == 0
    assert len(taken(tmp_path)) == 4


def test_a_wrong_number_is_the_exit_status(tmp_path: Path) -> None:
    code, _ = take(tmp_path, ("wrong", "good", "fails"))
    assert code == gpu_records.WRONG
    assert "WRONG: wrong: two and two are five" in (tmp_path / "summary.md").read_text()


def test_without_time_no_step_begins(tmp_path: Path) -> None:
    code, records = take(tmp_path, ("good", "last"), minutes=0.0)
    assert code == gpu_records.MISSING
    assert {name: (record["state"], record["rows"]) for name, record in records.items()} == {
        "good": ("no time left", []),
        "last": ("no time left", []),
    }
    assert not (tmp_path / "taken").exists()


def test_limits_and_estimates_are_those_of_the_docstring() -> None:
    """Every step is described; its limit is the one that holds, and the estimates stay below the
    whole."""
    found = re.findall(r"^    (\w+) +(\d+) +(\d+)  ", gpu_run.__doc__ or "", re.MULTILINE)
    described = {name: (int(estimate), int(limit)) for name, estimate, limit in found}
    assert {step.name: step.limit for step in STEPS} == {
        name: limit for name, (_, limit) in described.items()
    }
    assert list(described) == [step.name for step in STEPS]
    assert sum(estimate for estimate, _ in described.values()) < 60 * gpu_run.MINUTES


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that lacks what a lent machine lacks, with Triton's interpreter and no
    GPU."""
    for name in ABSENT:
        (folder / f"{name}.py").write_text("raise ImportError('it is not here')\n")
    # a lent machine's Transformers, where the suite is run with that one
    path = os.pathsep.join(
        [str(folder), str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {
        **others,
        "PYTHONPATH": path,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_dry_run_measures_everything(tmp_path: Path) -> None:
    """Every step to its end, without what a lent machine lacks: each with its machine and its
    figures."""
    folder, absent = tmp_path / "run", tmp_path / "absent"
    absent.mkdir()
    done = script(
        absent, str(BENCHMARKS / "gpu_run.py"), str(folder), "--dry-run", "--minutes", "60"
    )
    assert done.returncode == 0, (
        done.stdout + done.stderr + "\n".join(file.read_text() for file in folder.glob("*.log"))
    )
    records = {step.name: json.loads((folder / f"{step.name}.json").read_text()) for step in STEPS}
    assert json.loads((folder / "summary.json").read_text())["steps"] == list(records.values())
    for record in records.values():
        assert (record["state"], record["error"]) == ("done", "")
        assert record["seconds"] > 0
        assert record["machine"] == json.loads((folder / "machine.json").read_text())
        assert {"cpu", "torch", "triton", "transformers", "kernels", "code"} <= record[
            "machine"
        ].keys()
    rows = {name: record["rows"] for name, record in records.items()}
    assert {row["backend"].partition(",")[0] for row in rows["doctor"]} == {"kernels", "torch"}
    assert all(row["works"] == "yes" for row in rows["doctor"])
    for name in ("tests", "more_tests"):
        assert {row["outcome"] for row in rows[name]} == {"passed"}
    check_calls(rows)
    check_parts(rows["profile"])
    assert [row["kernel"] for row in rows["tune"]] == [
        "prefill",
        "search",
        "decode search",
        "votes",
    ]
    assert all(
        row["ms"] > 0
        and row["present_ms"] > 0
        and row["tile"] != row["present"]
        and not row["problem"]
        for row in rows["tune"]
    )
    check_model([row for row in rows["model"] if "weights" in row], "checkpoint", 512)
    quality = {row["settings"]: row for row in rows["model"] if "digits" in row}
    assert quality["dense"]["path"] == "sdpa"
    assert quality["defaults"]["path"] == "sparse"
    assert quality["defaults"]["perplexity_over_dense"] > 0
    again = script(absent, str(BENCHMARKS / "gpu_run.py"), str(folder), "--dry-run")
    assert (again.returncode, again.stdout) == (0, "")  # nothing was left to do


def check_calls(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Attention calls of every shape, against a baseline, and rows that must be those of dense
    attention."""
    agreeing = [row for row in rows["prefill"] if "allowed" in row]
    assert [(row["length"], row["rows"], row["path"]) for row in agreeing] == [
        (length, name, "sparse") for length in (128, 192) for name in ("first", "last")
    ]
    assert all(0 <= row["error"] <= row["allowed"] for row in agreeing)
    calls = [
        row for name in ("prefill", "decode", "backward") for row in rows[name] if "hip_ms" in row
    ]
    graphed = ["decode amortised", "decode refreshed"]
    steps = [*graphed, "decode selection", *(f"{phase}, launched" for phase in graphed)]
    assert [(row["phase"], row["batch"], row["length"]) for row in calls] == [
        *((phase, 1, length) for length in (128, 192) for phase in ("prefill", "selection")),
        *((phase, 2, 96) for phase in steps),
        ("backward", 1, 128),
    ]
    for row in calls:
        assert (row["path"], row["hip_ms"] > 0) == ("sparse", True)
        assert "selection" in row["phase"] or row["times_faster"] == pytest.approx(
            row["sdpa_ms"] / row["hip_ms"]
        )


def check_model(rows: list[dict[str, Any]], weights: str, length: int) -> None:
    """A prompt, and then generation, with each of the settings."""
    names = ["dense", "defaults", "all sparse"]
    assert {(row["weights"], row["length"]) for row in rows} == {(weights, length)}
    assert [row["settings"] for row in rows if row.get("prompt_ms", 0) > 0] == names
    assert [row["settings"] for row in rows if row.get("tokens_per_s", 0) > 0] == names


def check_parts(rows: list[dict[str, Any]]) -> None:
    """Prompt and decode step: what is not in the parts is between them."""
    calls = dict.fromkeys((row["what"], row["length"]) for row in rows)
    fewer = [("hyper", 192), ("delta", 192), ("gradients", 128)]
    assert list(calls) == [("prompt", 128), ("prompt", 192), ("decode", 96), *fewer]
    for call in calls:
        whole, host, kernels, gaps, *parts = [
            row for row in rows if (row["what"], row["length"]) == call
        ]
        assert [row["part"] for row in (whole, host, kernels, gaps)] == [
            "whole",
            "host",
            "kernels",
            "gaps",
        ]
        assert kernels["ms"] == pytest.approx(sum(part["ms"] for part in parts))
        assert kernels["launches"] == pytest.approx(sum(part["launches"] for part in parts))
        assert gaps["ms"] == pytest.approx(whole["ms"] - kernels["ms"])
        assert host["ms"] > 0
        assert [part["ms"] for part in parts] == sorted(
            (part["ms"] for part in parts), reverse=True
        )


PIECES = """
import sys
from dataclasses import replace
from pathlib import Path
import gpu_sizes, gpu_steps
folder = Path(sys.argv[1])
sizes = replace(gpu_sizes.DRY, tests=((str(folder / "test_of_two.py"),), ()), model=folder)
print([gpu_steps.take(name, folder, sizes) for name in ("tests", "model")])
print(sorted((*gpu_sizes.FIRST, *gpu_sizes.SECOND, *gpu_sizes.NO_GPU)) == gpu_sizes.EVERY)
run = gpu_steps.Run("pieces", folder, sizes)
run.keep("one", lambda: [{"figure": 1}])
run.keep("two", lambda: 1 // 0)
run.keep("three", lambda: [{"figure": 3}])
sized = gpu_steps.Run("sized", folder, gpu_sizes.Sizes())
gpu_steps.free_bytes, asked = lambda device: 78 << 30, []
sized.latency = lambda plan, phase, length: asked.append((plan.batch, length, *phase))
gpu_steps.decode_step(sized)
print(asked)
plan = gpu_sizes.Sizes().plan(batch=16)
print([gpu_steps.fitting(plan, 1 << 20, free * 2**30) for free in (139, 80, 40, 1, float("inf"))])
print(run.failed, [value["rows"][0]["figure"] for value in run.kept.done.values()])
(folder / "machine.json").write_text('{"cpu": "another"}')
try:
    gpu_steps.take("prefill", folder, sizes)
except ValueError as error:
    print(error)
"""


def test_pieces_of_steps(tmp_path: Path) -> None:
    """A test that fails is a wrong number; where the model is not there, another is timed; every
    kernel test belongs to a half; a piece that fails leaves the others; decode steps have as many
    sequences as fit, each of 5.2 GiB at a million keys; a folder belongs to one machine."""
    (tmp_path / "test_of_two.py").write_text(
        "def test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2, 'far off'\n"
    )
    done = script(tmp_path, "-c", PIECES, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-6:-4] == ["[0, 0]", "True"]
    wanted = [(1, 131072), (1, 1 << 20), (16, 131072), (14, 1 << 20)]
    assert literal_eval(lines[-4]) == [
        (*call, phase) for call in wanted for phase in ("decode", "launched")
    ]
    assert lines[-3] == "[16, 14, 7, 1, 16]"
    assert lines[-2] == "['two: ZeroDivisionError: integer division or modulo by zero'] [1, 3]"
    assert "with figures of another" in lines[-1]
    assert "cpu" in lines[-1]
    rows = gpu_records.rows_of(tmp_path, "tests")
    assert [
        (row["test"].rpartition("::")[2], row["outcome"], bool(row["wrong"])) for row in rows
    ] == [
        ("test_good", "passed", False),
        ("test_bad", "failed", True),
    ]
    assert "far off" in rows[1]["wrong"]
    rows = gpu_records.rows_of(tmp_path, "model")
    check_model(rows, "random", 192)


def test_rows_are_those_of_finished_cells(tmp_path: Path) -> None:
    kept = Resumable(tmp_path / "step.json", {})
    kept.get(("a",), lambda: {"rows": [{"x": 1}, {"x": 2}], "refused": []})
    kept.get(("b",), lambda: {"rows": [{"x": 3}]})
    (tmp_path / "step.json.partial").open("a").write('["cut off')
    assert [row["x"] for row in gpu_records.rows_of(tmp_path, "step")] == [1, 2, 3]
    assert gpu_records.rows_of(tmp_path, "other") == []


def test_what_was_measured_stands_in_the_table_of_the_kernels() -> None:
    """Calls of one sequence, and kernels of a prompt; of the device that measured them."""

    def call(phase: str, batch: int, ms: float) -> dict[str, Any]:
        return {"phase": phase, "batch": batch, "length": 8192, "hip_ms": ms, "sdpa_ms": 10 * ms}

    def part(what: str, name: str, ms: float) -> dict[str, Any]:
        return {"what": what, "length": 8192, "part": name, "launches": 1, "ms": ms}

    steps = {
        "prefill": [
            {"rows": "last", "length": 8192, "error": 0.0},
            call("prefill", 1, 1.0),
            call("selection", 1, 0.25),
        ],
        "decode": [
            call("decode amortised", 1, 0.5),
            call("decode amortised", 16, 7.0),
            call("decode refreshed, launched", 1, 8.0),
        ],
        "backward": [call("backward", 1, 3.0)],
        "profile": [
            part("prompt", "need_kernel", 0.125),
            part("prompt", "attend_kernel", 0.75),
            part("prompt", "gaps", 3.0),
            part("decode", "attend_kernel", 0.002),
            part("gradients", "key_gradient_kernel", 2.0),
            part("hyper", "square_kernel", 4.0),
            part("delta", "spread_kernel", 5.0),
        ],
    }
    machine = {"device": "NVIDIA H100 80GB HBM3"}
    document = {
        "steps": [{"step": name, "machine": machine, "rows": rows} for name, rows in steps.items()]
    }
    gpu, measured = roofline.measured_in(document)
    assert gpu == "H100"
    assert {name: ms for (name, _), ms in measured.items()} == {
        "prefill": 1.0, "prefill: selection": 0.25, "prefill: dense": 10.0,
        "decode, amortised": 0.5, "decode: dense": 5.0, "prefill: need_kernel": 0.125,
        "prefill: attend_kernel": 0.75, "backward": 3.0, "backward: dense": 30.0,
        "decode: attend_kernel": 0.002, "backward: key_gradient_kernel": 2.0,
        "hyper: square_kernel": 4.0, "delta: spread_kernel": 5.0,
    }  # fmt: skip
    rows = roofline.rows((8192, 32768), HiPConfig(), Shape(target="sm90"), gpu, measured)
    assert {
        row["step"]: row["measured"]
        for row in rows
        if row["measured"] is not None and row["tokens"] == 8192
    } == {name: ms for (name, _), ms in measured.items()}
    assert all(0 <= row["floor"] <= row["model"] > 0 for row in rows)
    # one program alone leaves nothing to be merged
    assert {row["step"].partition(": ")[2] for row in rows if not row["floor"]} == {
        "choose_kernel",
        "combine_kernel",
    }
    assert all(row["measured"] is None for row in rows if row["tokens"] == 32768)
    first = roofline.table(rows, gpu).splitlines()[2].split(" | ")
    assert [cell.count("/") for cell in first[1:]] == [2, 2]
    assert (first[0], first[1].endswith("/ 1"), first[2].endswith("/ |")) == (
        "| prefill",
        True,
        True,
    )


def test_of_a_run_that_was_cut_the_table_takes_what_there_is(tmp_path: Path) -> None:
    """Steps without a machine or rows, and none of most; of GPUs only those whose figures are
    known."""
    take(tmp_path, ("doctor", "prefill"), minutes=0.0)
    document = json.loads((tmp_path / "summary.json").read_text())
    assert [step["machine"] for step in document["steps"]] == [None, None]
    with pytest.raises(ValueError, match="got None, allowed: one of H200, H100, A100, RTX 4090"):
        roofline.measured_in(document)
    row = {"phase": "prefill", "batch": 1, "length": 8192, "hip_ms": 1.0, "sdpa_ms": None}
    for device, gpu in (
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
    ):
        document["steps"][1] |= {"machine": {"device": device}, "rows": [row]}
        assert roofline.measured_in(document) == (gpu, {("prefill", 8192): 1.0})
    for device in ("NVIDIA L40S", "NVIDIA GH200 480GB"):
        document["steps"][1]["machine"] = {"device": device}
        with pytest.raises(ValueError, match=f"got '{device}', allowed"):
            roofline.measured_in(document)


def test_other_methods_add_up() -> None:
    """By hand, at 256 tokens: four leaves of 64, squares of 128 and twice 64 rows, each with 16
    keys of its own and 16 others."""
    options, shape = hyper.Options(4, 16, 16, 64), Shape(4, 2, 16, 2)
    assert roofline.hashing(256, options, shape) == KernelCost(
        2 * 256 * 6 * 16 * 4, 256 * 6 * (32 + 4)
    )
    assert roofline.hashing(64, options, shape) == NO_COST
    pairs, result = 4 * 64 * 64 // 2, 4 * 17 * 4
    assert roofline.leaves(256, options, shape) == KernelCost(
        4 * pairs * 4 * 16, pairs / 64 * 2 * 64 + 256 * (128 + result)
    )
    assert roofline.squares(256, options, shape) == KernelCost(
        4 * 256 * 32 * 4 * 16, 16 * 4 * 32 * 64 + 256 * (128 + 2 * result)
    )
    pairs = 256 * 256 // 2 // 16  # of every 16th row, 64 of which make a tile
    assert roofline.anchor_rows(256, 16, shape) == KernelCost(
        4 * pairs * 4 * 16, pairs / 64 * 2 * 64 + 16 * (128 + result)
    )
    assert roofline.anchor_rows(256, 16, Shape(2, 2, 16, 2)).bytes == pairs / 128 * 2 * 64 + 16 * (
        64 + result / 2
    )
    assert roofline.spreading(256, shape) == KernelCost(0, 2 * 256 * (128 + 4 * 4))


def test_every_kernel_of_a_profile_has_a_row_in_the_table() -> None:
    rows = {name.partition(": ")[2] for name in roofline.kernels(8192, HiPConfig(), Shape())}
    assert {launch.kernel.fn.__name__ for launch in launches_of(64, torch.bfloat16, "sm90")} == rows
