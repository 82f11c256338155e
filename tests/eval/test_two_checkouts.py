"""`benchmarks/two_checkouts.py`: a checkout against itself, and what is no checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import two_checkouts
from repository import ROOT


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "two_checkouts.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_checkout_against_itself() -> None:
    rows = two_checkouts.compare(ROOT, [512, 1536], ["fp32"], rounds=1)
    assert [(row["phase"], row["length"]) for row in rows] == [
        (phase, length) for phase in ("prefill", "decode") for length in (512, 1536)
    ]
    for row in rows:
        assert row["ratio"] == row["other_s"] / row["this_s"] > 0
    assert [row["length"] for row in rows if "exponent" in row] == [1536]


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert f"checkout: got {tmp_path}, allowed: a folder that holds hip_hf/" in done.stderr
    assert not done.stdout
